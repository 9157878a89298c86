"""Options of the training loop: those of the optimisation, and those of the loop itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from advvl.checks import (
    at_least,
    check_each,
    choice,
    flag,
    fraction,
    fractions,
    is_number,
    not_negative,
    positive,
    positive_or_infinite,
    shown,
    text,
)
from advvl.errors import ConfigurationError

Schedule = Literal["one-cycle", "linear", "warmup-linear", "uniter"]
Nonfinite = Literal["raise", "skip"]
Weighting = Literal["examples", "micro-batches"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW, its schedule over all updates, and the gradient's clipping; a checkpoint belongs to one set of these.

    Arguments:
        epochs: passes over the examples.
        batch_size: examples in an update, over all processes and micro-batches.
        learning_rate: the highest of the schedule.
        weight_decay: of all parameters but biases and normalisations.
        schedule: of the learning rate over the updates; see `advvl.fit.schedules.schedule`.
        warmup: fraction of the updates in which the rate rises.
        clip: largest L2 norm of the whole gradient; infinite: no clipping.
        betas: decay of the running means of the gradient and of its square.

    Raises:
        ConfigurationError: a value of another type or out of its range.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: Schedule = "one-cycle"
    warmup: float = 0.1
    clip: float = 2.0
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size")
        positive(self, "learning_rate")
        not_negative(self, "weight_decay")
        choice(self, "schedule", Schedule)
        fraction(self, "warmup")
        positive_or_infinite(self, "clip")
        fractions(2, self, "betas")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of the loop itself; a resumed run may use others.

    Arguments:
        accumulate: micro-batches into which each process splits its share of an update.
        workers: processes that prepare batches, for each process of the run; batches are copied to a GPU while it
            computes. The source must be picklable where processes are not forked.
        nonfinite: if a loss or the gradient is not finite, `"raise"`, or `"skip"` the update: parameters, buffers and
            optimiser stay as they are in all processes. Overflows under a loss scaler are skipped by the scaler.
        skip_limit: the number of consecutive skipped updates that raises the error anyway.
        checkpoint_seconds: between checkpoints, by the main process's clock.
        progress: show a progress bar.
        description: the run's name, in the bar and in messages.
        line: the bar's line, counted from the cursor's.

    Raises:
        ConfigurationError: a value of another type or out of its range.
    """

    accumulate: int = 1
    workers: int = 0
    nonfinite: Nonfinite = "raise"
    skip_limit: int = 10
    checkpoint_seconds: float = 30.0
    progress: bool = False
    description: str = "fit"
    line: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "accumulate", "skip_limit")
        at_least(0, self, "workers", "line")
        choice(self, "nonfinite", Nonfinite)
        check_each(
            self, ("checkpoint_seconds",), lambda value: is_number(value) and value >= 0, "a number of 0 or more"
        )
        flag(self, "progress")
        text(self, "description")


def loop_of(loop: object, named: Mapping[str, Any]) -> LoopOptions:
    """The options of a loop, with single ones replaced by name.

    Raises:
        ConfigurationError: something else than options, an unknown name, or a value out of its range.
    """
    if loop is not None and not isinstance(loop, LoopOptions):
        raise ConfigurationError(f"expected loop as LoopOptions(…), or None, got {shown(loop)}")
    known = [option.name for option in fields(LoopOptions)]
    for name in named:
        if name not in known:
            raise ConfigurationError(f"expected an argument of fit or an option of its loop, {known}, got {name!r}")
    return replace(loop or LoopOptions(), **named)
