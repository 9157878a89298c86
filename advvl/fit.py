"""The training loop: a model, a source of batches, perhaps a method; killed and resumed at will.

Everything random in an update (the batch's corruption, dropout, adversarial starts) is drawn from generators seeded by
the run's seed and the update's number, and the order of examples by the seed and the epoch. A checkpoint therefore
holds no state of any random number generator, and a run taken up again after any kill computes the same bits as one
never killed.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.adapters.base import Adapter, adapt
from advvl.errors import CheckpointError, ConfigurationError, NonFiniteError
from advvl.maximizers import AscentState
from advvl.optimization import derive_seed, examples_of, parameter_groups, schedule, updates_per_epoch
from advvl.options import OptimizerOptions
from advvl.signals import deferred_signals
from advvl.storage import fingerprint, read_torch, write_torch
from advvl.training import AdversarialTraining


class BatchSource(Protocol):
    """Examples by number; deterministic given the indices and the generator."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The batch of these examples; whatever is random in it is drawn from `generator` (CPU)."""


@dataclass(frozen=True)
class FitResult:
    """What a run of updates came to.

    `seconds` is the time of the updates alone, without checkpoints, summed over the processes that did them: the one
    field that differs between equal runs.
    """

    updates: int
    seconds: float
    losses: tuple[float, ...]

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
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
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
        options: batch size (over all processes), learning rate and so on.
        updates: how many; `options.epochs` over the source by default.
        method: an `advvl.AdversarialTraining`; None for the plain mean loss.
        adversarial_tasks: the batches (by their entry "task") that `method` is for, the others getting the plain step;
            None for all.
        target: makes the adapter from the prepared model.
        checkpoint: the file that holds the run's state, written every `checkpoint_seconds` and at the end.
        resume: take up the state in `checkpoint` if there is one; otherwise it is started anew and replaced.

        progress, line, description: show a progress bar, on which line below the cursor's, called what.

    On SIGINT or SIGTERM the update is finished, the state saved, and `SystemExit` raised. The global random number
    generators are left as found.

    Errors: `ConfigurationError` under several processes; `NonFiniteError` names the update whose loss or gradient is
    not finite; `CheckpointError` if `checkpoint` is of another run.
    """
    if len(source) < 1:
        raise ConfigurationError("expected a source of at least 1 example, got none")
    if updates is None:
        updates = options.epochs * updates_per_epoch(len(source), options.batch_size)
    accelerator = accelerator or Accelerator()
    if accelerator.num_processes > 1:
        raise ConfigurationError(
            f"expected one process, got {accelerator.num_processes}: the batches of a task-drawing source would differ in "
            "task between processes; write the loop around AdversarialTraining.step, which runs under DDP"
        )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.learning_rate, betas=options.betas
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    loop = _Loop(
        accelerator,
        prepared,
        optimizer,
        options,
        seed,
        None if method is None else _Adversary(method, adversarial_tasks, target(prepared), AscentState()),
        fingerprint({"options": asdict(options), "updates": updates, "seed": seed, "examples": len(source)}),
    )
    if resume and checkpoint is not None and checkpoint.exists():
        loop.load(checkpoint)
    bar = partial(
        tqdm, desc=description, position=line, disable=not progress, leave=False, mininterval=0.5, dynamic_ncols=True
    )
    with deferred_signals() as caught, _global_randomness_restored(), bar(total=updates, initial=loop.done) as shown:
        saved = time.monotonic()
        while loop.done < updates:
            loop.advance(source, updates)
            shown.set_postfix(loss=f"{loop.losses[-1]:.3f}", refresh=False)
            shown.update()
            due = time.monotonic() - saved >= checkpoint_seconds or loop.done == updates or caught.signal
            if checkpoint is not None and due:
                loop.save(checkpoint)
                saved = time.monotonic()
            caught.leave_if_any(f"{description}: stopped after update {loop.done} of {updates}")
    return FitResult(updates=loop.done, seconds=loop.seconds, losses=tuple(loop.losses))


@dataclass
class _Adversary:
    """What adversarial updates need: the method, the tasks it is for, the adapter, and what it carries along."""

    method: AdversarialTraining
    tasks: Collection[str] | None
    target: Adapter
    state: AscentState

    def wants(self, batch: Mapping[str, Any]) -> bool:
        return self.tasks is None or batch.get("task") in self.tasks


@dataclass
class _Loop:
    """A run in progress: the things that take part in an update, and how far it has come."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    options: OptimizerOptions
    seed: int
    adversary: _Adversary | None
    identity: str
    done: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def advance(self, source: BatchSource, updates: int) -> None:
        """One update of the parameters, drawn, computed and timed."""
        started = time.perf_counter()
        number, rank = self.done, self.accelerator.process_index
        indices = examples_of(number, len(source), self.options.batch_size, self.seed)
        batch = source.batch(indices[rank :: self.accelerator.num_processes], self._generator("batch"))
        _seed_everything(derive_seed(self.seed, "update", number, rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * schedule(self.options, number, updates)
        loss = self._update(send_to_device(batch, self.accelerator.device))
        self.done = number + 1
        self.losses.append(loss)
        self.seconds += time.perf_counter() - started

    def _update(self, batch: Mapping[str, Any]) -> float:
        adversary = self.adversary
        if adversary is None or not adversary.wants(batch):
            loss = self.model(**batch).loss.mean()
            self.accelerator.backward(loss)
            value = _finite("loss", float(loss.detach()), self.done)
            self._apply_gradients()
            return value
        try:
            report = adversary.method.step(
                adversary.target,
                batch,
                backward=self.accelerator.backward,
                update=self._apply_gradients,
                generator=self._generator("method"),
                state=adversary.state,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"update {self.done}: {error}") from error
        return _finite("loss", float(report.loss), self.done)

    def _apply_gradients(self) -> None:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        _finite("norm of the gradients", float(norm), self.done)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _generator(self, purpose: str) -> torch.Generator:
        number, rank = self.done, self.accelerator.process_index
        return torch.Generator().manual_seed(derive_seed(self.seed, purpose, number, rank))

    def save(self, path: Path) -> None:
        """Write everything that the next update depends on."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "identity": self.identity,
            "done": self.done,
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.adversary.state.state_dict() if self.adversary else {},
        }
        write_torch(path, state)

    def load(self, path: Path) -> None:
        """Take up what `save` wrote. Errors: `CheckpointError` if it is of another run."""
        state = read_torch(path)
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            raise CheckpointError(
                f"expected the state of a run of these options, seed and number of updates in {str(path)!r}, got one "
                "of another; start without resuming, or with another file"
            )
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"expected the state of this model in {str(path)!r}, got another's: {error}"
            ) from error
        if self.adversary:
            self.adversary.state.load_state_dict(send_to_device(state["method"], self.accelerator.device))
        self.done, self.seconds, self.losses = state["done"], state["seconds"], state["losses"].tolist()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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


def _finite(what: str, value: float, update: int) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"expected a finite {what} in update {update}, got {value}; lower learning_rate, or look at that batch"
        )
    return value
