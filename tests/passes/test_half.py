"""Moves of training under autocast to fp16: they are those of fp32, however small the loss is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import L2, PGD, AdversarialTraining, Ascent, EmbeddingPerturber, FreeLB, SymmetricKL, adapt
from advvl.passes import rounds
from advvl.perturbers.weights import WeightAscent
from advvl.recipes import awp, sam


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.hidden, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.hidden(self.words(ids)).tanh().mean(1)) + 0 * self.unused
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "ids": torch.randint(10, (8, 6), generator=generator),
        "labels": torch.randint(3, (8,), generator=generator),
    }


def step(method: AdversarialTraining, size: float, *, half: bool) -> Any:
    """A step on losses of this size; under autocast with a loss scale for the gradient that parameters get."""
    scale = 65536.0 if half else 1.0
    with torch.autocast("cpu", torch.float16, enabled=half):
        return method.step(
            adapt(Net(), {"text": "words"}),
            batch(),
            loss=lambda outputs, _: outputs["loss"] * size,
            backward=lambda loss: (loss * scale).backward(),
        )


def perturbed(maximizer: Any, **options: Any) -> AdversarialTraining:
    return AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.5)), maximizer, **options)


METHODS = {
    "PGD": perturbed(PGD(1)),
    "the clean pass": perturbed(FreeLB(2), regularizer=SymmetricKL(1e-9), dropout="shared"),
}


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-8])
@pytest.mark.parametrize("name", METHODS)
def test_every_row_moves_however_small_its_loss(name: str, size: float) -> None:
    found = step(METHODS[name], size, half=True)
    assert not int(found.nonfinite["text"])
    expected = step(METHODS[name], size, half=False)
    torch.testing.assert_close(found.delta_norms["text"], expected.delta_norms["text"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-9])
@pytest.mark.parametrize("name", ["sam", "awp"])
def test_weights_move_along_the_gradient_of_fp32(name: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    method = sam(rho=0.05) if name == "sam" else awp(METHODS["PGD"])
    steps: list[dict[str, Tensor]] = []
    moved = rounds.moved

    def seen(weights: Any, by: Any) -> Any:
        steps.append(by)
        return moved(weights, by)

    monkeypatch.setattr(rounds, "moved", seen)
    for half in (True, False):
        step(method, size, half=half)
    found, expected = ({n: v for n, v in by.items() if n != "unused"} for by in steps)
    assert found.keys() == expected.keys()
    assert isinstance(method.weights, WeightAscent)
    for weight, of_fp32 in expected.items():
        assert F.cosine_similarity(found[weight].flatten(), of_fp32.flatten(), dim=0) > 0.999, weight
        torch.testing.assert_close(found[weight].norm(), of_fp32.norm(), rtol=2e-2, atol=0)
