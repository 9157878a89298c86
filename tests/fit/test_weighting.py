"""What micro-batches weigh in an update, UNITER's schedule, and what a run logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from advvl.errors import ConfigurationError
from advvl.fit.loop import fit
from advvl.fit.options import OptimizerOptions
from advvl.fit.schedules import schedule

PARTS = [[0, 1, 2], [3], [4, 5]]


class Rows:
    def __init__(self, *, scalar: bool) -> None:
        self.scalar = scalar

    def __len__(self) -> int:
        return 6

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        return {"x": torch.tensor(indices, dtype=torch.float64) ** 2, "scalar": self.scalar}


class Parts:
    examples = 6

    def parts(self, update: int, seed: int) -> list[list[int]]:
        return PARTS

    def updates(self, epochs: int, seed: int) -> int:
        return epochs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, scalar: bool) -> dict[str, torch.Tensor]:
        losses = self.weight * x
        return {"loss": losses.mean() if scalar else losses}


def moved(*, scalar: bool = False, **arguments: Any) -> float:
    """How far one step of plain descent of rate 1 goes: the gradient."""
    model = Model()
    fit(
        model,
        Rows(scalar=scalar),
        options=OptimizerOptions(epochs=1, clip=float("inf"), schedule="linear", warmup=0.0),
        seed=0,
        sampler=Parts(),
        accumulate=3,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        accelerator=Accelerator(cpu=True),
        **arguments,
    )
    return 1 - float(model.weight.detach())


@pytest.mark.parametrize("scalar", [False, True], ids=["losses", "scalar"])
def test_micro_batches_weigh_the_same_where_asked(scalar: bool) -> None:
    means = [sum(row**2 for row in part) / len(part) for part in PARTS]
    assert moved(scalar=scalar, weighting="micro-batches") == pytest.approx(sum(means) / 3, rel=1e-14)


def test_examples_weigh_the_same_otherwise() -> None:
    assert moved() == pytest.approx(sum(row**2 for row in range(6)) / 6, rel=1e-14)
    with pytest.raises(ConfigurationError, match="expected one loss per row"):
        moved(scalar=True)


def test_another_weighting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected weighting to be one of examples, micro-batches, got 'rows'"):
        moved(weighting="rows")


@pytest.mark.parametrize(("updates", "warm"), [(20, 5), (6000, 600), (24000, 1500)])
def test_uniters_schedule_is_that_of_its_published_code(updates: int, warm: int) -> None:
    options = OptimizerOptions(schedule="uniter", warmup=warm / updates, learning_rate=8e-5)
    for step in {1, 2, warm - 1, warm, warm + 1, updates - 1}:
        factor = step / warm if step < warm else (updates - step) / (updates - warm)
        assert schedule(options, step - 1, updates) == pytest.approx(factor, rel=1e-12)
    assert 8e-5 * schedule(options, updates - 1, updates) == pytest.approx(1e-8, rel=1e-12)


def test_every_update_is_logged_once() -> None:
    seen: list[tuple[int, float, float]] = []
    moved(updates=3, log=lambda *values: seen.append(values))
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert [factor for _, _, factor in seen] == pytest.approx([1, 2 / 3, 1 / 3])
    assert seen[0][1] == pytest.approx(55 / 6, rel=1e-14)
