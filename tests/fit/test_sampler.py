"""Training with a sampler: its examples, the same bits after a kill, and no other sampler than the run's."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from advvl.data.mixing import MixedSampler, MixedSource
from advvl.data.row_draws import RowDraws
from advvl.data.sampling import TokenBuckets
from advvl.data.source import Sampler
from advvl.errors import CheckpointError, ConfigurationError, NonFiniteError
from advvl.fit.loop import FitResult, fit
from advvl.fit.options import LoopOptions, OptimizerOptions

LENGTHS = {"a": 1 + torch.arange(30) % 9, "b": 1 + torch.arange(21) % 5}
OPTIONS = OptimizerOptions(epochs=1, learning_rate=0.1)


class Rows:
    """Rows of a task, with noise of their own; the process is asked to stop before batch `stop`."""

    def __init__(self, task: str, stop: int | None = None, poison: int | None = None) -> None:
        self.task, self.stop, self.poison, self.asked = task, stop, poison, []

    def __len__(self) -> int:
        return len(LENGTHS[self.task])

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        if len(self.asked) == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked.append(list(indices))
        x = torch.tensor(indices)[:, None].sin() + RowDraws.of(indices, generator).uniform("noise", 3).float()
        x[torch.tensor(indices) == (-1 if self.poison is None else self.poison)] = torch.nan
        return {"x": x, "task": self.task}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.2)) for task in LENGTHS})

    def forward(self, x: torch.Tensor, task: str) -> dict[str, torch.Tensor]:
        return {"loss": (self.heads[task](x)[:, 0] - 1) ** 2}


def buckets(task: str, **options: Any) -> TokenBuckets:
    return TokenBuckets(LENGTHS[task], 18, **{"bucket": 12, "multiple": 1, **options})


def mixed(**options: Any) -> MixedSampler:
    return MixedSampler({task: buckets(task, **options) for task in LENGTHS}, {"a": 2, "b": 1})


def run(
    sampler: Sampler, stop: int | None = None, poison: int | None = None, **arguments: Any
) -> tuple[Model, FitResult, dict[str, Rows]]:
    model = Model()
    sources = {task: Rows(task, *((stop, poison) if task == "a" else ())) for task in LENGTHS}
    usual: dict[str, Any] = {"options": OPTIONS, "seed": 2, "accelerator": Accelerator(cpu=True)}
    result = fit(model, MixedSource(sources), sampler=sampler, **{**usual, **arguments})
    return model, result, sources


def test_a_run_has_the_samplers_examples_and_updates() -> None:
    sampler = mixed()
    _, result, sources = run(sampler)
    assert result.updates == sampler.updates(1, 2)
    seen: dict[str, list[list[int]]] = {task: [] for task in LENGTHS}
    for update in range(result.updates):
        (part,) = sampler.parts(update, 2)
        task = "a" if part[0] < 30 else "b"
        seen[task].append([row - (0 if task == "a" else 30) for row in part])
    assert {task: source.asked for task, source in sources.items()} == seen
    assert all(len(asked) > 2 for asked in seen.values())


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_a_killed_run_of_several_tasks_resumes_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole, expected, _ = run(mixed())
    with pytest.raises(SystemExit):
        run(mixed(), stop, checkpoint=tmp_path / "run.pt")
    resumed, result, sources = run(mixed(), checkpoint=tmp_path / "run.pt", resume=True)
    assert 0 < sum(len(source.asked) for source in sources.values()) < result.updates
    assert result.losses == expected.losses
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_micro_batches_are_the_samplers_and_weigh_by_their_rows() -> None:
    sampler = mixed(micro_batches=3)
    _, _, sources = run(sampler, updates=4, accumulate=3)
    parts = [[row % 30 if part[0] >= 30 else row for row in part] for u in range(4) for part in sampler.parts(u, 2)]
    assert sorted(sum((source.asked for source in sources.values()), [])) == sorted(parts)  # noqa: RUF017
    assert len({len(part) for part in parts}) > 1


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    poisoned = next(u for u in range(99) if any(7 in part for part in mixed().parts(u, 2)))
    (examples,) = mixed().parts(poisoned, 2)
    named = re.escape(f"in update {poisoned}, got nan of the examples {examples}")
    with pytest.raises(NonFiniteError, match=named):
        run(mixed(), poison=7)


def test_a_checkpoint_belongs_to_its_sampler(tmp_path: Path) -> None:
    run(mixed(), checkpoint=tmp_path / "run.pt", updates=3)
    for other in (mixed(bucket=11), MixedSampler({task: buckets(task) for task in LENGTHS}, {"a": 1, "b": 1})):
        with pytest.raises(CheckpointError, match="sampler"):
            run(other, checkpoint=tmp_path / "run.pt", updates=3, resume=True)


def test_samplers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"of 2 parts, the processes times accumulate=2, got one of 1"):
        run(mixed(), loop=LoopOptions(accumulate=2))
    with pytest.raises(ConfigurationError, match="expected a sampler of the source's 51 examples, got one of 30"):
        run(buckets("a"))
    with pytest.raises(ConfigurationError, match="expected sampler to be a Sampler"):
        run([[1, 2]])  # type: ignore[arg-type]


class Kept(Rows):
    """Rows that remember nothing: those that workers ask for are asked for in another process."""

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        batch = super().batch(indices, generator)
        return {**batch, "process": os.getpid()}


class Watching(Model):
    """A model that keeps the processes that its batches were made in, and asks to be stopped in an update."""

    def __init__(self, stop: int = -1) -> None:
        super().__init__()
        self.stop = stop
        self.processes: list[int] = []

    def forward(self, process: int, **fields: Any) -> dict[str, torch.Tensor]:
        self.processes.append(process)
        if len(self.processes) == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [True, False])
def test_batches_made_ahead_are_those_made_in_time(sampled: bool, tmp_path: Path) -> None:
    """Of a run that is killed and taken up again, too; they come from other processes, as many as asked for."""
    sampler = buckets("a") if sampled else None

    def trained(stop: int = -1, **arguments: Any) -> tuple[Watching, FitResult]:
        model = Watching(stop)
        named = {"options": OPTIONS, "seed": 2, "updates": 9, "accelerator": Accelerator(cpu=True), **arguments}
        return model, fit(model, Kept("a"), sampler=sampler, **named)

    whole, expected = trained()
    ahead, result = trained(workers=2)
    assert set(whole.processes) == {os.getpid()}
    assert len(set(ahead.processes)) == 2
    assert os.getpid() not in ahead.processes
    with pytest.raises(SystemExit):
        trained(4, workers=2, checkpoint=tmp_path / "run.pt")
    again, resumed = trained(workers=2, checkpoint=tmp_path / "run.pt", resume=True)
    assert len(again.processes) == 9 - 4
    for model, found in ((ahead, result), (again, resumed)):
        assert found.losses == expected.losses
        torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
