"""Small models that take a perturbation as an argument, so that a published loop can be written without the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import Adapter, Site


class PixelNet(nn.Module):
    """Pixels `(B, 3, 4, 4)` to scores of 5 classes; `delta` is added to the pixels."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, 2)
        self.mix = nn.Linear(24, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, y: Tensor | None = None, delta: Tensor | None = None) -> dict[str, Tensor]:
        x = x if delta is None else x + delta
        features = self.dropout(torch.tanh(self.mix(torch.tanh(self.patches(x)).flatten(1))))
        logits = self.head(features)
        outputs = {"logits": logits, "features": features}
        return outputs if y is None else outputs | {"loss": F.cross_entropy(logits, y)}


class WordNet(nn.Module):
    """Words `(B, T)` and their mask to scores of 5 classes; `delta` is added to the embedded words."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor, mask: Tensor, y: Tensor, delta: Tensor | None = None) -> dict[str, Tensor]:
        embedded = self.words(ids)
        embedded = embedded if delta is None else embedded + delta
        hidden = self.dropout(torch.tanh(self.mix(embedded))) * mask.unsqueeze(-1)
        logits = self.head(torch.tanh(hidden.sum(1)))
        return {"logits": logits, "loss": F.cross_entropy(logits, y)}


def pixels(*, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 3, 4, 4, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(5, (rows,), generator=generator)}


def words(*, rows: int = 4, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Row i has `length - i % 3` words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (rows, length), generator=generator)
    mask = torch.arange(length) < (length - torch.arange(rows) % 3)[:, None]
    return {"ids": ids, "mask": mask, "y": torch.randint(5, (rows,), generator=generator)}


def pixel_net(*, dropout: float = 0.0, **options: Any) -> Adapter:
    torch.manual_seed(0)
    return Adapter(PixelNet(dropout).double(), {"image": Site("patches", at="input")}, **options)


def word_net(*, dropout: float = 0.0, **options: Any) -> Adapter:
    torch.manual_seed(0)
    return Adapter(WordNet(dropout).double(), {"text": Site("words", mask=lambda batch: batch["mask"])}, **options)


def agree(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-12, *, least: float = 0.0) -> None:
    """Both are there and differ by no more than `tolerance` of the largest entry expected, or of `least`."""
    assert found is not None
    assert expected is not None
    worst, largest = (found - expected).abs().max().item(), max(expected.abs().max().item(), least)
    assert worst <= tolerance * largest, f"differ by {worst:.2g}, {worst / largest:.2g} of the largest entry"


def agree_on_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The `.grad` of every parameter is the expected one; of a parameter without, none or zero is.

    An entry that is zero but for rounding, as of the bias of keys, is held to a thousandth of the largest of all.
    """
    assert expected.keys() == dict(model.named_parameters()).keys()
    least = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        agree(found, expected[name], least=least)


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
