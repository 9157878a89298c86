"""The training loop: a model, a source of batches, perhaps a method; killed and resumed at will, on any number of processes.

Everything random in an update (the batch's corruption, dropout, adversarial starts) is drawn from generators seeded by
the run's seed and the update's number, and the order of examples by the seed and the epoch. A checkpoint therefore
holds no state of any random number generator, and a run taken up again after any kill computes the same bits as one
never killed. See `docs/training-loop.md`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapt
from advvl.data.source import BatchSource
from advvl.errors import ConfigurationError
from advvl.fit.checkpoints import Checkpoints, OneFile
from advvl.fit.options import OptimizerOptions
from advvl.fit.runs import Run
from advvl.fit.schedules import parameter_groups, updates_per_epoch
from advvl.fit.shares import Count
from advvl.fit.signals import Caught, deferred_signals
from advvl.fit.updates import Adversary, Updater
from advvl.maximizers.base import AscentState
from advvl.runtime.descriptions import described
from advvl.runtime.processes import check_agreement, process_count
from advvl.training import AdversarialTraining

__all__ = ["BatchSource", "Checkpoints", "FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a run of updates came to.

    `seconds` is the time of the updates alone, without checkpoints and evaluations, summed over the runs that did them:
    the one field that differs between equal runs. A skipped update's loss is NaN.
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
    method: AdversarialTraining | None = None,
    adversarial_tasks: Collection[str] | None = None,
    target: Callable[[nn.Module], Adapter] = adapt,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    accelerator: Accelerator | None = None,
    accumulate: int = 1,
    count: Count | None = None,
    nonfinite: Literal["raise", "skip"] = "raise",
    skip_limit: int = 10,
    checkpoint: Path | Checkpoints | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    progress: bool = False,
    line: int = 0,
    description: str = "fit",
) -> FitResult:
    """Train `model` in place; it ends on the accelerator's device, in training mode.

    AdamW (Loshchilov & Hutter, 2019; no weight decay of biases and normalisations) under `schedule`, with clipping.

    Arguments:
        model: called with a batch's entries as keywords; its output has `loss`, a scalar or one per row (B,).
        options: batch size (over all processes and micro-batches), learning rate and so on.
        updates: how many; `options.epochs` over the source by default.
        method: an `advvl.AdversarialTraining`; None for the plain mean loss.
        adversarial_tasks: the batches (by their entry "task") that `method` is for, the others getting the plain step;
            None for all.
        target: makes the adapter from the prepared model.
        optimizer: makes the optimiser from the model; the schedule multiplies each group's own rate. None: AdamW, by
            the options.
        accumulate: micro-batches that each process cuts its share of an update into.
        count: from a batch, how many entries its loss is the mean of (masked tokens, say); for a scalar loss over several
            processes or micro-batches, which hold different numbers of them.
        nonfinite: where a loss or the gradient is not finite, `"raise"`, or `"skip"` the update: parameters, buffers and
            optimiser stay as they are in all processes. An overflow under a loss scaler is the scaler's to skip.
        skip_limit: so many updates skipped in a row are an error all the same.
        checkpoint: the file that holds the run's state, or the directory that holds several; written by the main
            process, read by all, every `checkpoint_seconds` by its clock and at the end.
        resume: take up the latest state in `checkpoint` if there is one; otherwise it is started anew and replaced.

        progress, line, description: show a progress bar, on which line below the cursor's, called what.

    On SIGINT or SIGTERM in any process the update is finished, the state saved, and `SystemExit` raised in all. The
    global random number generators are left as found.

    Errors: `ConfigurationError` if processes disagree on what they run, or for what cannot be run; `NonFiniteError` names
    the update whose loss or gradient is not finite, and its examples; `CheckpointError` if `checkpoint` is of another run
    or version; `OutputDirectoryError` if a directory holds checkpoints and `resume` is False.
    """
    if len(source) < 1:
        raise ConfigurationError("expected a source of at least 1 example, got none")
    if updates is None:
        updates = options.epochs * updates_per_epoch(len(source), options.batch_size)
    accelerator = accelerator or Accelerator()
    _check(accelerator, method, min(options.batch_size, len(source)), accumulate, nonfinite)
    store = OneFile(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    if store is not None:
        store.open(resume=resume)
    built = _adamw(model, options) if optimizer is None else optimizer(model)
    identity = {
        "options": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()},
        "updates": updates,
        "seed": seed,
        "examples": len(source),
        "method": described(method),
        "adversarial_tasks": None if adversarial_tasks is None else sorted(adversarial_tasks),
        "optimizer": {"class": type(built).__name__, "groups": dict(enumerate(map(_settings, built.param_groups)))},
    }
    every = store.every if isinstance(store, Checkpoints) else 0
    how = {
        "accumulate": accumulate,
        "nonfinite": (nonfinite, skip_limit),
        "resume": (resume, type(store).__name__, every),
    }
    for what, value in {**identity, **how}.items():
        check_agreement(what, value)
    prepared, built = accelerator.prepare(model, built)
    prepared.train()
    adversary = None if method is None else Adversary(method, adversarial_tasks, target(prepared), AscentState())
    updater = Updater(
        accelerator, prepared, built, source, options, seed, updates, accumulate, count, adversary, nonfinite == "skip"
    )
    run = Run(updater, store, identity, nonfinite == "skip", skip_limit)
    main = accelerator.is_main_process
    bar = partial(
        tqdm,
        desc=description,
        position=line,
        disable=not (progress and main),
        leave=False,
        mininterval=0.5,
        dynamic_ncols=True,
    )
    with deferred_signals() as caught, _global_randomness_restored():
        if resume:
            run.resume()
        with bar(total=updates, initial=run.done) as shown:
            saved = time.monotonic()
            while run.done < updates:
                loss = run.advance()
                expired = main and time.monotonic() - saved >= checkpoint_seconds
                number, due = run.agree(loss, caught.signal, expired=expired)
                shown.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
                shown.update()
                if store is not None and (run.evaluate() or due or number or run.done == updates):
                    run.save()
                    saved = time.monotonic()
                if number:
                    _leave(caught, number, main, f"{description}: stopped after update {run.done} of {updates}")
        caught.leave_if_any(f"{description}: stopped after update {run.done} of {updates}")
    return FitResult(run.done, run.seconds, tuple(run.losses), run.skipped, dict(run.scores))


def _check(
    accelerator: Accelerator, method: AdversarialTraining | None, batch_size: int, accumulate: int, nonfinite: str
) -> None:
    kind: Any = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigurationError(
            f"expected every process to hold all parameters, as under DDP, got {kind.value}, which shards them; write the "
            "loop around AdversarialTraining.step"
        )
    started = max(process_count(), int(os.environ.get("WORLD_SIZE", "1")))
    if started != accelerator.num_processes:
        raise ConfigurationError(
            f"expected an accelerator that knows of all {started} processes, got one of {accelerator.num_processes}, which "
            "would train alone; make it in each of them, on CPUs by Accelerator(cpu=True)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigurationError(
            "expected an accelerator with gradient_accumulation_steps=1, got "
            f"{accelerator.gradient_accumulation_steps}; give accumulate={accelerator.gradient_accumulation_steps} instead"
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigurationError(f"expected accumulate to be a whole number of 1 or more, got {accumulate!r}")
    parts = accelerator.num_processes * accumulate
    if batch_size < parts:
        raise ConfigurationError(
            f"expected a batch of at least an example for each of {accelerator.num_processes} processes times {accumulate} "
            f"micro-batches, got {batch_size}; use fewer, or a larger batch_size"
        )
    if nonfinite not in ("raise", "skip"):
        raise ConfigurationError(f"expected nonfinite to be 'raise' or 'skip', got {nonfinite!r}")
    if method is None:
        return
    if method.maximizer.updates > 1 and accumulate > 1:
        raise ConfigurationError(
            f"expected accumulate=1 with {method.maximizer.updates} updates a batch ({type(method.maximizer).__name__}), "
            f"got {accumulate}; each of its updates takes effect before the next pass"
        )
    if method.maximizer.updates > 1 and nonfinite == "skip":
        raise ConfigurationError(
            f"expected nonfinite='raise' with {method.maximizer.updates} updates a batch "
            f"({type(method.maximizer).__name__}), got 'skip'; the first of them have taken effect when a later pass is "
            "found not to be finite"
        )
    if accelerator.scaler is not None and method.nonfinite == "raise":
        raise ConfigurationError(
            "expected AdversarialTraining(…, nonfinite='keep') with a loss scaler, whose first updates overflow by design, "
            "got 'raise'"
        )


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
    """Obey a signal that some process has caught; the main one says so."""
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
