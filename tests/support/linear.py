"""A linear model of three classes over words and regions: its distances to the boundary are known in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advvl import Adapter, Site
from advvl.evaluation.objectives import as_scores, margin


class Linear(nn.Module):
    """Logits `(B, 2)` from words `(B, T, D)` and regions `(B, R, E)`: linear in both, padding left out."""

    def __init__(self, words: tuple[int, int] = (4, 3), regions: tuple[int, int] = (3, 5), *, classes: int = 2) -> None:
        super().__init__()
        self.words, self.regions = nn.Identity(), nn.Identity()
        generator = torch.Generator().manual_seed(1)
        self.text = nn.Parameter(torch.randn(classes, *words, generator=generator, dtype=torch.float64))
        self.image = nn.Parameter(torch.randn(classes, *regions, generator=generator, dtype=torch.float64))

    def forward(self, words: Tensor, regions: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        words = self.words(words) * mask.unsqueeze(-1)
        return torch.einsum("btd,ctd->bc", words, self.text) + torch.einsum(
            "bre,cre->bc", self.regions(regions), self.image
        )

    def normals(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The gradient of each row's margin by words and by regions, `(B, …)`, for two classes."""
        sign = torch.where(batch["labels"] == 0, -1.0, 1.0).double().view(-1, 1, 1)
        text = -sign * (self.text[1] - self.text[0]).detach() * batch["mask"].unsqueeze(-1)
        return {"text": text, "image": (-sign * (self.image[1] - self.image[0]).detach()).expand(len(sign), -1, -1)}


def linear(**shapes: Any) -> Adapter:
    sites = {
        "text": Site("words", mask=lambda batch: batch["mask"]),
        "image": Site("regions"),
    }
    model = Linear(**shapes)
    return Adapter(model, sites, loss=margin_of)


def linear_batch(rows: int = 6, words: tuple[int, int] = (4, 3), regions: tuple[int, int] = (3, 5)) -> dict[str, Any]:
    """Row i has `4 - i % 3` words; labels are the model's own answers, so that all rows are right."""
    generator = torch.Generator().manual_seed(2)
    length = (words[0] - torch.arange(rows) % 3).clamp(min=1)
    batch = {
        "words": torch.randn(rows, *words, generator=generator, dtype=torch.float64),
        "regions": torch.randn(rows, *regions, generator=generator, dtype=torch.float64),
        "mask": torch.arange(words[0]) < length[:, None],
        "labels": torch.zeros(rows, dtype=torch.long),
    }
    batch["labels"] = Linear(words, regions)(**batch).argmax(1)
    return batch


def margin_of(outputs: Tensor, batch: Any) -> Tensor:
    return margin(outputs, as_scores(batch["labels"], outputs))


def correct_of(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.argmax(1) == batch["labels"]
