"""Backwards that cannot work are refused in words that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.draws import randn
from support.toy import perturber, toy, toy_batch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    AscentState,
    Attack,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    SymmetricKL,
    adapt,
)
from advvl.errors import ConfigurationError


@pytest.mark.parametrize("regularizer", [None, SymmetricKL()])
def test_a_task_loss_without_a_graph_is_refused(regularizer: SymmetricKL | None) -> None:
    method = AdversarialTraining(perturber(), FreeLB(2), regularizer)
    with pytest.raises(ConfigurationError, match=r"with a graph beside|requires grad"):
        method.step(toy(), toy_batch(), loss=lambda outputs, batch: outputs["loss"].detach())


def test_a_batch_with_a_graph_behind_it_is_named() -> None:
    backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
    batch = toy_batch() | {"regions": backbone(randn(3, 4, 4))}
    with pytest.raises(ConfigurationError, match="got one behind 'regions'; detach it"):
        AdversarialTraining(perturber(), FreeLB(3)).step(toy(), batch)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, max_norm=1.0)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = F.linear(self.words(ids).tanh().mean(1), self.words.weight)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def test_a_weight_that_every_forward_writes_to_is_named() -> None:
    torch.manual_seed(0)
    batch = {"ids": torch.arange(20).view(4, 5), "labels": torch.arange(4)}
    method = AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3)), FreeLB(3), SymmetricKL())
    with pytest.raises(ConfigurationError, match=r"max_norm.*'words' \(Embedding\)"):
        method.step(adapt(Tied(), {"text": "words"}), batch)


def test_replays_inside_autocast_see_the_updated_weights() -> None:
    """Autocast keeps casts of the weights, which an update makes stale."""
    found = []
    for outer in (True, False):
        target = toy(dtype=torch.float32)
        optimizer = torch.optim.SGD(target.model.parameters(), lr=0.5)

        def update(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        def call(model: nn.Module, batch: Any, outer: bool = outer) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True, cache_enabled=outer):
                return model(**batch)

        target.call = call
        losses: list[Any] = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(0.1), step_size=0.1)), FreeAT(4)).step(
                target, toy_batch(dtype=torch.float32), update=update, state=AscentState(), trace=losses.append
            )
        found.append([one.task_loss.item() for one in losses])
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    assert found[0][-1] < found[0][0] * 0.98  # the updates did something


def test_the_best_loss_of_a_row_is_a_finite_one() -> None:
    passes = [0]

    def loss(outputs: Any, batch: Any) -> Tensor:
        passes[0] += 1
        return outputs["loss"].masked_fill((torch.arange(3) == 1) & (passes[0] == 1), torch.nan)

    result = Attack(perturber(ball=L2(0.5)), PGD(3, keep="best"), loss=loss)(toy(), toy_batch())
    assert result.losses is not None
    assert result.losses.isfinite().all()


def test_a_radius_of_zero_is_refused_unless_allowed() -> None:
    with pytest.raises(ConfigurationError, match=r"pass math\.inf for no bound"):
        Ascent(L2(0.0), step_size=0.1)
    assert Ascent(L2(0.0), step_size=0.1, allow_zero_step=True).ball == L2(0.0)
