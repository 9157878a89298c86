"""A run in progress: its progress, the agreement of its processes after each update, and its state in checkpoints."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]

from advvl.errors import CheckpointError, NonFiniteError
from advvl.fit.checkpoints import FORMAT, Checkpoints, OneFile, read_checkpoint
from advvl.fit.updates import Unusable, Updater
from advvl.maximizers.base import AscentState
from advvl.runtime.processes import check_agreement
from advvl.runtime.states import kept_modes


@dataclass
class Run:
    """A run of updates, which may be killed and resumed at any time.

    Arguments:
        updater: does an update by its number.
        store: of checkpoints; None: there are none.
        identity: the values that distinguish this run from others.
    """

    updater: Updater
    store: Checkpoints | OneFile | None
    identity: Mapping[str, Any]
    done: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def accelerator(self) -> Accelerator:
        return self.updater.accelerator

    def advance(self) -> float:
        """One update, computed and timed, or skipped; this process's part of its loss, NaN if skipped."""
        started = time.perf_counter()
        try:
            loss = self.updater.run(self.done)
            self.in_a_row = 0
        except Unusable as error:
            if self.updater.loop.nonfinite == "raise":
                raise
            self.skipped, self.in_a_row, loss = self.skipped + 1, self.in_a_row + 1, math.nan
            if self.in_a_row >= self.updater.loop.skip_limit:
                raise NonFiniteError(f"{self.in_a_row} updates in a row had to be skipped: {error}") from error
        self.done += 1
        self.seconds += time.perf_counter() - started
        return loss

    def agree(self, loss: float, caught: int, *, expired: bool) -> tuple[int, bool]:
        """Record the loss of all processes; the signal that any of them has caught, and whether time has expired in one."""
        interrupted, terminated = caught == signal.SIGINT, caught == signal.SIGTERM
        loss, *flags = self.updater.total(loss, interrupted, terminated, expired)
        self.losses.append(loss)
        return (signal.SIGTERM if flags[1] else signal.SIGINT if flags[0] else 0), bool(flags[2])

    def evaluate(self) -> bool:
        """Score the model if that is due; whether its score is one of the best."""
        store = self.store
        if store is None or store.evaluate is None or not store.due(self.done, self.updater.updates):
            return False
        model = self.accelerator.unwrap_model(self.updater.model)
        with kept_modes(model):
            model.eval()
            score = float(store.evaluate(model))
        (score,) = self.updater.total(score if self.accelerator.is_main_process else 0.0)
        if not math.isfinite(score):
            raise NonFiniteError(f"expected a finite score after {self.done} updates, got {score}; see evaluate")
        self.scores[self.done] = score
        return self.done in store.top(self.scores)

    def save(self) -> None:
        """Let the main process write everything that the next update depends on; all processes wait for it."""
        updater, accelerator = self.updater, self.accelerator
        methods = _gathered(accelerator, updater.adversary.state.state_dict() if updater.adversary else {})
        if accelerator.is_main_process and self.store is not None:
            self.store.write(
                {
                    "format": FORMAT,
                    "run": dict(self.identity),
                    "done": self.done,
                    "seconds": self.seconds,
                    "losses": torch.tensor(self.losses, dtype=torch.float64),
                    "skipped": (self.skipped, self.in_a_row),
                    "scores": self.scores,
                    "model": accelerator.unwrap_model(updater.model).state_dict(),
                    "optimizer": updater.optimizer.state_dict(),
                    "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                    "methods": methods,
                    "averages": [one.state_dict() for one in updater.adversary.averages] if updater.adversary else [],
                }
            )
        accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Continue from the state that `save` wrote, if there is one.

        Raises:
            CheckpointError: it is damaged, or of another run, model or version.
            ConfigurationError: processes find different ones.
        """
        updater, accelerator = self.updater, self.accelerator
        path, state, error = None if self.store is None else self.store.latest(), None, None
        try:
            state = None if path is None else read_checkpoint(path, self.identity)
        except CheckpointError as caught:
            error = caught  # which all processes must notice before one ends
        check_agreement("what to resume from", str(error) if state is None else (str(path), state["done"]))
        if error is not None:
            raise error
        if state is None:
            return
        updater.rehearse()
        try:
            accelerator.unwrap_model(updater.model).load_state_dict(state["model"])
            updater.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as wrong:
            raise CheckpointError(
                f"expected the state of this model in {str(path)!r}, got another's: {wrong}; start without resuming, or "
                "with another file"
            ) from wrong
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if updater.adversary is not None:
            carried = _own(state["methods"], accelerator)
            updater.adversary.state.load_state_dict(send_to_device(carried, accelerator.device))
            averages, kept = updater.adversary.averages, state.get("averages", [])
            if len(averages) != len(kept):
                raise CheckpointError(
                    f"expected the averages of {len(averages)} references in {str(path)!r}, got {len(kept)}: an earlier "
                    "version left them out; start without resuming"
                )
            for average, weights in zip(averages, kept, strict=True):
                average.load_state_dict(weights)
        self.done, self.seconds, self.losses = state["done"], state["seconds"], state["losses"].tolist()
        (self.skipped, self.in_a_row), self.scores = state["skipped"], state["scores"]
        if self.store is not None and accelerator.is_main_process:
            self.store.tidy(self.scores)


def _gathered(accelerator: Accelerator, value: Mapping[str, Any]) -> list[Any] | None:
    """Return the values of all processes, in the main one."""
    value = send_to_device(value, "cpu")
    if accelerator.num_processes == 1:
        return [value]
    found: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object(value, found)
    return found


def _own(methods: Sequence[dict[str, Any]], accelerator: Accelerator) -> dict[str, Any]:
    """Return the carried state of this process's method; nothing if the processes were others, with other rows."""
    if len(methods) == accelerator.num_processes:
        own: dict[str, Any] = methods[accelerator.process_index]
        return own
    if any(method["deltas"] for method in methods):
        warnings.warn(
            f"perturbations carried by {len(methods)} processes cannot be handed on to {accelerator.num_processes}, which "
            "have other rows; they start over",
            stacklevel=4,
        )
    return AscentState().state_dict()
