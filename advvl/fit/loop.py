"""The training loop: a model, a source of batches, perhaps a method; killed and resumed at will, on any number of processes.

Everything random in an update (the batch's corruption, dropout, adversarial starts) is drawn from generators seeded by
the run's seed and the update's number, and the order of examples by the seed and the epoch. A checkpoint therefore
holds no state of any random number generator, and a run resumed after any kill computes the same bits as one that was
never killed. See `docs/training-loop.md`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapt
from advvl.data.source import BatchSource, Sampler
from advvl.fit.checkpoints import Checkpoints, OneFile, sole_run
from advvl.fit.checks import check_accelerator, check_arguments, check_method, check_sampler
from advvl.fit.options import LoopOptions, OptimizerOptions, Weighting, loop_of
from advvl.fit.runs import Run
from advvl.fit.schedules import parameter_groups, schedule, updates_per_epoch
from advvl.fit.shares import Count
from advvl.fit.signals import Caught, deferred_signals
from advvl.fit.updates import Adversary, Updater
from advvl.maximizers.base import AscentState
from advvl.runtime.descriptions import described
from advvl.runtime.processes import check_agreement
from advvl.training import AdversarialTraining

Log = Callable[[int, float, float], None]

__all__ = ["BatchSource", "Checkpoints", "FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The outcome of a run.

    Arguments:
        updates: the number of finished updates, including skipped ones.
        seconds: of the updates alone, without checkpoints and evaluations, summed over all resumed runs; the only field
            that differs between equal runs.
        losses: of each update; NaN if it was skipped.
        scores: of evaluations, by the number of updates.
    """

    updates: int
    seconds: float
    losses: tuple[float, ...]
    skipped: int = 0
    scores: Mapping[int, float] = field(default_factory=dict)

    @property
    def seconds_per_update(self) -> float:
        return self.seconds / self.updates if self.updates else 0.0


def fit(
    model: nn.Module,
    source: BatchSource,
    *,
    options: OptimizerOptions,
    seed: int,
    updates: int | None = None,
    sampler: Sampler | None = None,
    method: AdversarialTraining | Mapping[str, AdversarialTraining] | None = None,
    adversarial_tasks: Collection[str] | None = None,
    adversarial_from: int = 0,
    target: Callable[[nn.Module], Adapter] = adapt,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    accelerator: Accelerator | None = None,
    count: Count | None = None,
    weighting: Weighting = "examples",
    log: Log | None = None,
    checkpoint: Path | OneFile | Checkpoints | None = None,
    resume: bool = False,
    loop: LoopOptions | None = None,
    **named: Any,
) -> FitResult:
    """Train `model` in place; it ends on the accelerator's device, in training mode.

    AdamW (Loshchilov & Hutter, ICLR 2019; no weight decay of biases and normalisations) under a schedule, with clipping.

    Arguments:
        model: called with a batch's entries as keywords; its output has `loss`, a scalar or one per row (B,).
        options: batch size, learning rate and so on.
        seed: everything random follows from it.
        updates: how many; None: `options.epochs` over the source.
        sampler: decides the examples of each micro-batch, such as `advvl.data.sampling.TokenBuckets`, instead of
            `options.batch_size`; None: each epoch is shuffled, and cut into batches of that size.
        method: an `advvl.AdversarialTraining`, or a mapping from tasks (a batch's entry "task") to methods, with plain
            steps for the other tasks; None: plain steps on the mean loss. An `Averaged` that it compares with is
            updated after every update, and kept in checkpoints. References and discretisers go to the accelerator's
            device.
        adversarial_tasks: the tasks (a batch's entry "task") that `method` applies to; other batches get plain steps.
            None: all.
        adversarial_from: the number of plain updates before `method` applies. VILLA trains plainly for the first half
            of its pre-training (Gan et al., NeurIPS 2020).
        target: makes the adapter from the prepared model.
        optimizer: makes the optimiser from the model; the schedule multiplies each group's own rate. None: AdamW, by
            the options.
        count: from a batch to the number of entries in its mean loss, such as masked tokens; for a scalar loss over
            several processes or micro-batches, which hold different numbers of them.
        weighting: the loss of an update is the mean over its "examples", whatever their micro-batches, or the mean over
            its "micro-batches", each with equal weight, as in UNITER's published code; `count` is then not needed.
        log: called by the main process after each update with the number of updates done, its loss and the factor of the
            learning rate.
        checkpoint: the file for the run's state, or the directory for several; written by the main process, read by
            all. A `OneFile` also scores the model at intervals.
        resume: continue from the latest state in `checkpoint` if there is one; otherwise the run starts over and
            replaces it.
        loop: micro-batches, non-finite updates, time between checkpoints, progress; None: `LoopOptions()`.
        named: single options of `LoopOptions` by name, which replace those in `loop`, as in `accumulate=4`.

    On SIGINT or SIGTERM in any process the update is finished, the state saved, and `SystemExit` raised in all. The
    global random number generators are left as found.

    Raises:
        ConfigurationError: an argument of another type; processes that disagree on what they run; a run that cannot be,
            see `advvl.fit.checks`.
        NonFiniteError: a loss or gradient that is not finite; it names the update and its examples.
        CheckpointError: a `checkpoint` of another run or version.
        OutputDirectoryError: a directory that holds checkpoints, without `resume`; checkpoints that another run is
            writing, or that cannot be written.
    """
    loop = loop_of(loop, named)
    check_arguments(
        model=model,
        source=source,
        options=options,
        seed=seed,
        updates=updates,
        sampler=sampler,
        method=method,
        adversarial_tasks=adversarial_tasks,
        adversarial_from=adversarial_from,
        target=target,
        optimizer=optimizer,
        accelerator=accelerator,
        count=count,
        weighting=weighting,
        log=log,
        checkpoint=checkpoint,
        resume=resume,
        loop=loop,
    )
    if updates is None and sampler is not None:
        updates = sampler.updates(options.epochs, seed)
    elif updates is None:
        updates = options.epochs * updates_per_epoch(len(source), options.batch_size)
    accelerator = accelerator or Accelerator()
    check_accelerator(accelerator, None if sampler is not None else min(options.batch_size, len(source)), loop)
    if sampler is not None:
        check_sampler(sampler, source, seed, accelerator, loop)
    for one in method.values() if isinstance(method, Mapping) else [method]:
        if one is not None:
            check_method(one, accelerator, loop)
    store = OneFile(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    if store is not None:
        store.open(resume=resume)
    built = _adamw(model, options) if optimizer is None else optimizer(model)
    identity = {
        "options": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()},
        "updates": updates,
        "seed": seed,
        "examples": len(source),
        **({} if sampler is None else {"sampler": described(sampler)}),
        "method": described(method),
        "adversarial_tasks": None if adversarial_tasks is None else sorted(adversarial_tasks),
        **({"adversarial_from": adversarial_from} if adversarial_from else {}),
        **({"weighting": weighting} if weighting != "examples" else {}),
        "optimizer": {"class": type(built).__name__, "groups": dict(enumerate(map(_settings, built.param_groups)))},
    }
    every = 0 if store is None else store.every
    how = {
        "accumulate": loop.accumulate,
        "nonfinite": (loop.nonfinite, loop.skip_limit),
        "resume": (resume, type(store).__name__, every),
    }
    for what, value in {**identity, **how}.items():
        check_agreement(what, value)
    prepared, built = accelerator.prepare(model, built)
    prepared.train()
    adversary = (
        None
        if method is None
        else Adversary(method, adversarial_tasks, target(prepared), AscentState(), first=adversarial_from)
    )
    updater = Updater(
        accelerator=accelerator,
        model=prepared,
        optimizer=built,
        source=source,
        options=options,
        loop=loop,
        seed=seed,
        updates=updates,
        count=count,
        adversary=adversary,
        sampler=sampler,
        equal=weighting == "micro-batches",
    )
    run = Run(updater, store, identity)
    sole = sole_run(store, main=accelerator.is_main_process)
    with sole, deferred_signals() as caught, _global_randomness_restored():
        if resume:
            run.resume()
        _advance(run, caught, log)
    return FitResult(run.done, run.seconds, tuple(run.losses), run.skipped, dict(run.scores))


def _advance(run: Run, caught: Caught, log: Log | None) -> None:
    """Do the remaining updates, save when it is time, and stop on a signal."""
    loop, updates = run.updater.loop, run.updater.updates
    main = run.accelerator.is_main_process
    stopped = f"{loop.description}: stopped after update {{}} of {updates}"
    with tqdm(
        total=updates,
        initial=run.done,
        desc=loop.description,
        position=loop.line,
        disable=not (loop.progress and main),
        leave=False,
        mininterval=0.5,
        dynamic_ncols=True,
    ) as bar:
        saved = time.monotonic()
        while run.done < updates:
            loss = run.advance()
            expired = main and time.monotonic() - saved >= loop.checkpoint_seconds
            number, due = run.agree(loss, caught.signal, expired=expired)
            if log is not None and main:
                log(run.done, run.losses[-1], schedule(run.updater.options, run.done - 1, updates))
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
            bar.update()
            if run.store is not None and (run.evaluate() or due or number or run.done == updates):
                run.save()
                saved = time.monotonic()
            if number:
                _leave(caught, number, main, stopped.format(run.done))
    caught.leave_if_any(stopped.format(run.done))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """All of an optimiser's group but its parameters, in plain values."""
    return {
        name: value if value is None or isinstance(value, bool | int | float | str) else described(value)
        for name, value in group.items()
        if name != "params"
    }


def _adamw(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas
    )


def _leave(caught: Caught, number: int, main: bool, message: str) -> None:
    """Obey a signal that some process has caught; the main process prints a message."""
    caught.signal = number
    if main:
        caught.leave_if_any(message)
    raise SystemExit(128 + number)


@contextmanager
def _global_randomness_restored() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
