"""The parts of an experiment: what it gives the runner, which does everything else.

    PIXELS = Experiment(PixelOptions, data=data, rows=rows, set_up=set_up)
    run(PIXELS, PixelOptions(output="runs/pixels"))

An experiment trains rows from seeds; a row and a seed are a task. `examples/pgd_digits.py` is a whole one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from advvl.adapters.injection import Site
from advvl.data.source import BatchSource, Sampler
from advvl.experiments.options import ExperimentOptions
from advvl.fit.options import OptimizerOptions
from advvl.models.state_files import write_state
from advvl.runtime.randomness import derive_seed
from advvl.training import AdversarialTraining

Options = TypeVar("Options", bound=ExperimentOptions)
Data = TypeVar("Data")
Model = TypeVar("Model", bound=nn.Module)
Stage = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Row:
    """A model to train from each seed.

    Arguments:
        name: in messages and in the table.
        method: of training; None: the plain loss.
        start: the row or the file at whose weights it begins; None: at those drawn from the seed.
        stage: `"finetune"` rows are attacked and make the table, `"pretrain"` rows are there to start from.
        file: its name in file names; None: that of the table, in hyphens.
        updates: how many, as a multiple of those that its options ask for.
        update_cost: of one update, in any unit that the rows share; long rows are trained before short ones.
    """

    name: str
    method: AdversarialTraining | None = None
    _: KW_ONLY
    start: Row | Path | None = None
    stage: Stage = "finetune"
    file: str | None = None
    updates: float = 1.0
    update_cost: float = 1.0

    @property
    def key(self) -> str:
        return self.file or "-".join(re.findall(r"\w+", self.name.lower()))

    @property
    def cost(self) -> float:
        return self.updates * self.update_cost


@dataclass(frozen=True)
class Task:
    """A row, trained from one seed."""

    seed: int
    row: Row

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.row.name}"

    @property
    def weights(self) -> str:
        """The file of its model, in the output directory."""
        return f"seed-{self.seed}/{self.row.key}.safetensors"

    @property
    def record(self) -> str:
        """The file that says how it went, written when all else is done."""
        return f"seed-{self.seed}/{self.row.key}.json"

    @property
    def checkpoint(self) -> str:
        """The file from which it is resumed."""
        return f"seed-{self.seed}/{self.row.key}.progress.pt"


@dataclass(frozen=True)
class Setup:
    """A task's model, and the examples that it is trained on and attacked on.

    Arguments:
        model: with the weights at which training begins.
        train, options, optimizer, adversarial_tasks, sampler: as `fit` takes them.
        test: what a `"finetune"` row is attacked on.
        sites: where the model is perturbed, as `adapt` takes it; None: where its registered adapter says.
        boxes: bounds of perturbed tensors in the evaluation, by modality; None: there are none.
        method: in the place of the row's, where it needs the model or the data; as `fit` takes it.
        evaluate: from the model, in eval mode, to a score for the record's curve of scores by updates.
        evaluations: points of that curve, at equal distances; the last is at the end.
    """

    model: nn.Module
    train: BatchSource
    options: OptimizerOptions
    test: BatchSource | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    adversarial_tasks: Collection[str] | None = None
    sites: Mapping[str, Site | str] | None = None
    boxes: Mapping[str, tuple[float, float]] | None = None
    sampler: Sampler | None = None
    method: AdversarialTraining | Mapping[str, AdversarialTraining] | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    evaluations: int = 8


def save_tensors(model: nn.Module, path: Path) -> Path:
    """Write a model's tensors under their own names."""
    return write_state(model, path, str)


@dataclass(frozen=True)
class Experiment(Generic[Options, Data]):
    """An experiment; its functions have to be importable, since worker processes call them.

    Arguments:
        options: the dataclass of its options.
        data: opens what tasks share, once in each process.
        rows: what to train; the first of those in the table is what the others are compared with.
        set_up: makes a task's model. The path is that of the weights to begin at, of a row or a file; None: the row has
            no start.
        presets: options by the name of a preset, over the defaults.
        prepare: makes files in the output directory before anything else, if they are not there.
        save: writes a model's file.
        conclude: from the options, the rows of the table and the output directory to what is printed after the table; it
            may write files there.
    """

    options: type[Options]
    data: Callable[[Options, Path], Data]
    rows: Callable[[Options], Sequence[Row]]
    set_up: Callable[[Options, Data, Task, Path | None], Setup]
    presets: Mapping[str, Mapping[str, Any]] | None = None
    prepare: Callable[[Options, Path], None] | None = None
    save: Callable[[nn.Module, Path], object] = save_tensors
    conclude: Callable[[Options, Sequence[Row], Path], str] | None = None


def seeded(seed: int, kind: Callable[..., Model], *arguments: Any, **options: Any) -> Model:
    """Make a `kind(…)` whose parameters are drawn from the seed; the global generators stay as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, kind.__name__))
        return kind(*arguments, **options)
