"""VILLA on UNITER over the digits corpus: every seed through both stages, then one table.

Everything lies under one output directory, which belongs to one configuration:

    OUTPUT/configuration.yaml
    OUTPUT/seed-0/…                       models and records, see `advvl.experiments.uniter_stages`
    OUTPUT/results.{json,md}              all methods, all seeds
    OUTPUT/accuracy_against_radius.png
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from advvl.data.digits.corpus import DigitsConfig, digits_corpus
from advvl.errors import CheckpointError, ConfigurationError
from advvl.experiments.config import identity
from advvl.experiments.jobs import work_through
from advvl.experiments.options import ExperimentOptions
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.results import announced, claim, duration, label_of, publish, released_if_empty
from advvl.experiments.rows import BASELINE, Row, Start, adversary_of, rows_of, update_cost, updates_of
from advvl.experiments.runner import accelerator_on, device_of, reproducible
from advvl.experiments.uniter_stages import Bench, finetune, pretrain
from advvl.files import read_json

STARTS: Final[tuple[Start, ...]] = ("adversarial", "standard")


@dataclass(frozen=True)
class Task:
    """A stage one or a row of the table, from one seed."""

    seed: int
    what: Start | Row


def run(options: ExperimentOptions, *, progress: bool = True) -> None:
    """Run what the options ask for and is not there yet, then print and write the table.

    Errors: `OutputDirectoryError` if the output directory is another configuration's, or holds results that are neither
    to be taken up (`resume`) nor to be lost (`overwrite`); `ConfigurationError` if the options contradict each other or
    name a device that is not there; `CheckpointError` for a checkpoint that is not there or does not fit.
    """
    if options.checkpoint is not None and options.stage == "pretrain":
        raise ConfigurationError("expected stage finetune or all with a checkpoint, got pretrain, which it replaces")
    if options.checkpoint is not None and not Path(options.checkpoint).is_file():
        raise CheckpointError(f"expected a file at {options.checkpoint!r}, got none; check --checkpoint")
    device_of(options.device)
    with released_if_empty(options):
        _run(options, claim(options), progress)


def _run(options: ExperimentOptions, directory: OutputDirectory, progress: bool) -> None:
    began = time.monotonic()
    tasks = tasks_of(options)
    label = label_of(options.preset, options.seeds)
    print(f"{label}; {len(tasks)} models to train, {options.jobs} at a time, in {directory.path}", flush=True)
    work_through(open_worker, tasks, options, directory, progress, jobs=options.jobs)
    if options.stage != "pretrain":
        print("\n" + report(options, directory, time.monotonic() - began))
    trained = sum(read_json(record)["seconds"] for task in tasks if (record := _file(directory, task)).exists())
    print(
        f"this call took {duration(time.monotonic() - began)}; the updates of all {len(tasks)} models, whichever call "
        f"did them, {duration(trained)}; everything is in {directory.path}",
        flush=True,
    )


def tasks_of(options: ExperimentOptions) -> list[Task]:
    """What is to be trained, in an order in which several workers rarely wait: stage one before its rows, long first."""
    rows = rows_of(options.methods, given=options.checkpoint is not None)
    tasks: list[Task] = []
    for seed in options.seeds:
        if options.stage != "finetune":
            starts = {row.start for row in rows} - {"given"}
            tasks += [Task(seed, start) for start in STARTS if start in starts]
        if options.stage != "pretrain":
            tasks += [Task(seed, row) for row in sorted(rows, key=lambda row: _urgency(row, options))]
    return tasks


@contextmanager
def open_worker(
    index: int, options: ExperimentOptions, directory: OutputDirectory, progress: bool
) -> Iterator[Callable[[Task], None]]:
    """Make the corpus and find the device; then a function that does one task after another."""
    with reproducible(threads=options.threads):
        corpus = digits_corpus(DigitsConfig(**asdict(options.data)))
        terminal = sys.stderr.isatty()  # in a log, bars are a mess: lines then say what begins and what is done
        bench = Bench(options, directory, corpus, accelerator_on(options.device), progress and terminal, index)

        def handle(task: Task) -> None:
            with announced(_name(task), when=progress and not terminal and not _file(directory, task).exists()):
                if isinstance(task.what, Row):
                    finetune(bench, task.seed, task.what)
                else:
                    pretrain(bench, task.seed, task.what)

        yield handle


def report(options: ExperimentOptions, directory: OutputDirectory, seconds: float) -> str:
    """Write the table, `results.json` and the curve from the records of all rows and seeds; the table."""
    rows = rows_of(options.methods, given=options.checkpoint is not None)
    names = [row.name for row in rows]
    return publish(
        directory,
        {(row.name, seed): _record(directory, row, seed) for row in rows for seed in options.seeds},
        baseline=BASELINE if BASELINE in names else names[0],
        label=label_of(options.preset, options.seeds),
        evaluation=options.evaluation,
        document={
            "configuration": json.loads(json.dumps(identity(options)), parse_constant=str),  # an infinite radius
            "threads": options.threads,
            "seconds_of_last_call": seconds,
        },
    )


def _file(directory: OutputDirectory, task: Task) -> Path:
    """Where the record of a finished task lies."""
    key = task.what.key if isinstance(task.what, Row) else f"pretrained-{task.what}"
    return directory / f"seed-{task.seed}" / f"{key}.json"


def _name(task: Task) -> str:
    return f"seed {task.seed}, {task.what.name if isinstance(task.what, Row) else f'{task.what} pre-training'}"


def _record(directory: OutputDirectory, row: Row, seed: int) -> dict[str, Any]:
    record: dict[str, Any] = read_json(_file(directory, Task(seed, row)))
    return record


def _urgency(row: Row, options: ExperimentOptions) -> tuple[bool, int]:
    cost = updates_of(row, options, update_cost(adversary_of(row, options)))
    return row.start == "adversarial", -cost
