"""The one runner of all experiments: every row from every seed, trained, attacked, and put in one table.

Everything lies under one output directory, which belongs to one configuration. A model's record is written last, so that a
killed run does again only what has no record, from its last checkpoint:

    OUTPUT/configuration.yaml
    OUTPUT/seed-0/villa.{safetensors,json}      a row's model and record
    OUTPUT/seed-0/villa.progress.pt             its checkpoint, as long as it trains
    OUTPUT/results.{json,md}                    all rows, all seeds
    OUTPUT/accuracy_against_radius.png
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic

from accelerate import Accelerator  # type: ignore[import-untyped]
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.adapters.registry import adapt
from advvl.errors import CheckpointError, missing_extra
from advvl.evaluation.measurement import versions
from advvl.evaluation.protocol import attacked_scores, constant_score, data_fingerprint
from advvl.experiments.config import identity
from advvl.experiments.devices import accelerator_on, device_of, reproducible
from advvl.experiments.experiment import Data, Experiment, Options, Row, Setup, Task
from advvl.experiments.jobs import work_through
from advvl.experiments.outputs import claimed
from advvl.experiments.progress import Progress, counted, duration
from advvl.experiments.records import check_records, read_record, sha256, start_of
from advvl.experiments.results import label_of, report
from advvl.files import only_writer, read_json, write_json
from advvl.fit.checkpoints import OneFile
from advvl.fit.loop import fit
from advvl.fit.options import LoopOptions
from advvl.fit.schedules import updates_per_epoch
from advvl.runtime.randomness import derive_seed


def run(experiment: Experiment[Options, Data], options: Options, *, progress: bool = True) -> None:
    """Run what the options ask for and is not there yet, then print and write the table.

    Arguments:
        progress: show bars in a terminal; elsewhere say what begins and what is done.

    Raises:
        OutputDirectoryError: the output directory is another configuration's, is written by another process, cannot be
            written, or holds results that are neither to be taken up (`resume`) nor to be lost (`overwrite`).
        ConfigurationError: a device that is not there; a row whose start is neither there nor to be trained.
        CheckpointError: a file to start from that is not there or does not fit; a model's file that is not the recorded one.
        DataError: files of the experiment's that are not what their formats say.
        MissingExtraError: the plot or the data need a package that is not installed.
    """
    began = time.monotonic()
    rows = experiment.rows(options)
    for row in rows:
        if isinstance(row.start, Path) and not row.start.is_file():
            raise CheckpointError(f"expected a file at {str(row.start)!r}, got none; check --checkpoint")
    device_of(options.device)
    attacked = [row for row in rows if row.stage == "finetune"]
    if attacked and find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "report")
    whose = identity(options)
    with claimed(options.output, whose, resume=options.resume, overwrite=options.overwrite) as directory:
        if experiment.prepare is not None:
            experiment.prepare(options, directory)
        tasks = tasks_of(rows, options.seeds)
        check_records(directory, tasks)
        if options.jobs > 1:
            _rehearse(experiment, options, directory, tasks)
        label, count = label_of(options.preset, options.seeds), counted(len(tasks), "model")
        print(f"{label}; {count} to train, {options.jobs} at a time, in {directory}", flush=True)
        lines = Progress.of(directory, tasks) if progress else None
        work_through(open_worker, tasks, experiment, options, directory, lines, jobs=options.jobs)
        if attacked:
            print("\n" + report(options, attacked, directory, time.monotonic() - began))
            if experiment.conclude is not None:
                print(experiment.conclude(options, attacked, directory))
        trained = sum(read_json(directory / task.record)["seconds"] for task in tasks)
    print(
        f"this call took {duration(time.monotonic() - began)}; the updates of {count}, whichever call did them, "
        f"{duration(trained)}; everything is in {directory}",
        flush=True,
    )


def _rehearse(experiment: Experiment[Options, Data], options: Options, directory: Path, tasks: Sequence[Task]) -> None:
    """Make one model of those that begin at a given file, before several processes find that the file does not fit."""
    left = [task for task in tasks if not (directory / task.record).exists()]
    given = next((task for task in left if isinstance(task.row.start, Path)), None)
    if given is not None:
        experiment.set_up(options, experiment.data(options, directory), given, start_of(directory, given))


def tasks_of(rows: Sequence[Row], seeds: Sequence[int]) -> list[Task]:
    """Order the tasks so that workers rarely wait: starts first, then rows of the start that is done first, long first."""

    def urgency(row: Row) -> tuple[bool, float, float]:
        started = isinstance(row.start, Row)
        return started, row.start.cost if isinstance(row.start, Row) else 0.0, -row.cost

    return [Task(seed, row) for seed in seeds for row in sorted(rows, key=urgency)]


@contextmanager
def open_worker(
    index: int,
    experiment: Experiment[Options, Data],
    options: Options,
    directory: Path,
    lines: Progress | None,
) -> Iterator[Callable[[Task], None]]:
    """Open the data and find the device; then a function that does one task after another.

    Arguments:
        lines: of which run to say what is done, with progress bars in a terminal; None: say nothing.
    """
    with reproducible(threads=options.threads):
        data, accelerator = experiment.data(options, directory), accelerator_on(options.device)
        bars = lines is not None and sys.stderr.isatty()  # a mess in a log, where lines say what begins
        yield Worker(experiment, options, directory, data, accelerator, bars, index, lines).see_to


@dataclass(frozen=True)
class Worker(Generic[Options, Data]):
    """All that the tasks of one process share.

    Arguments:
        bars: show progress bars.
        index: the number of this process among those that share the work.
        lines: of which run to say what is done and, without bars, what begins; None: say nothing.
    """

    experiment: Experiment[Options, Data]
    options: Options
    directory: Path
    data: Data
    accelerator: Accelerator
    bars: bool
    index: int
    lines: Progress | None = None

    def see_to(self, task: Task) -> None:
        """Do a task that has no record; if another worker does it now, wait for that."""
        with only_writer(self.directory / task.weights, wait=True):
            if not (self.directory / task.record).exists():
                with announced(task.name, self.lines, beginning=not self.bars):
                    self.work(task)

    def work(self, task: Task) -> None:
        """Train a task's model from where a killed run left it, attack it, and write its file and its record."""
        start = self._start(task)
        setup = self.experiment.set_up(self.options, self.data, task, start)
        checkpoint, weights = self.directory / task.checkpoint, self.directory / task.weights
        record: dict[str, Any] = self._train(task, setup, checkpoint)
        self.experiment.save(setup.model, weights)
        record["start"] = None if start is None else {"file": start.name, "sha256": sha256(start)}
        record["sha256"] = sha256(weights)
        record["versions"] = versions()
        if setup.test is not None:
            record["scores"] = attacked_scores(
                adapt(setup.model, setup.sites),
                setup.test,
                self.options.evaluation,
                device=self.accelerator.device,
                seed=task.seed,
                boxes=setup.boxes,
            )
            record["chance"] = constant_score(setup.test, self.options.evaluation)
            record["data_fingerprint"] = data_fingerprint(setup.test, self.options.evaluation)
        write_json(self.directory / task.record, record)
        checkpoint.unlink(missing_ok=True)

    def _start(self, task: Task) -> Path | None:
        """Return the weights at which the task begins, waiting for them if another worker trains them now.

        Raises:
            CheckpointError: they are not there, or not what their record says.
        """
        start = task.row.start
        if isinstance(start, Row):
            wanted = Task(task.seed, start)
            if start.key in {row.key for row in self.experiment.rows(self.options)}:
                self.see_to(wanted)  # done, unless a record was lost
            read_record(self.directory, wanted)
        return start_of(self.directory, task)

    def _train(self, task: Task, setup: Setup, checkpoint: Path) -> dict[str, Any]:
        """Fit the model; say how it went, and return that for the record."""
        seed = derive_seed(task.seed, task.row.stage)
        usual = setup.options.epochs * updates_per_epoch(len(setup.train), setup.options.batch_size)
        if setup.sampler is not None:
            usual = setup.sampler.updates(setup.options.epochs, seed)
        updates = round(usual * task.row.updates)
        result = fit(
            setup.model,
            setup.train,
            options=setup.options,
            seed=seed,
            sampler=setup.sampler,
            updates=updates,
            method=task.row.method if setup.method is None else setup.method,
            adversarial_tasks=setup.adversarial_tasks,
            target=partial(adapt, sites=setup.sites),
            optimizer=setup.optimizer,
            accelerator=self.accelerator,
            checkpoint=OneFile(checkpoint, setup.evaluate, every=max(1, updates // setup.evaluations)),
            resume=True,
            loop=LoopOptions(progress=self.bars, description=task.name, line=self.index),
        )
        tqdm.write(
            f"{task.name}: {result.updates} updates of {1000 * result.seconds_per_update:.1f} ms, "
            f"last loss {result.losses[-1]:.3f}"
        )
        tail = result.losses[-max(1, len(result.losses) // 20) :]
        curve = {"curve": {str(done): score for done, score in result.scores.items()}} if result.scores else {}
        return {
            "updates": result.updates,
            "seconds": result.seconds,
            "seconds_per_update": result.seconds_per_update,
            "loss": sum(tail) / len(tail),
            **curve,
        }


@contextmanager
def announced(what: str, run: Progress | None, *, beginning: bool) -> Iterator[None]:
    """Say on standard error that something begins and, once it is done, how long it took and how far its run is."""
    if run is not None and beginning:
        tqdm.write(f"{what}: started", file=sys.stderr)
    began = time.monotonic()
    yield
    if run is not None:
        took = duration(time.monotonic() - began)
        tqdm.write(f"{what}: done in {took}; {run.now()}", file=sys.stderr)
