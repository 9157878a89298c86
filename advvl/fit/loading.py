"""The batches of updates, made on demand or ahead of time by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from advvl.data.source import BatchSource, Sampler
from advvl.errors import AdvVLError
from advvl.fit.schedules import examples_of
from advvl.runtime.randomness import derive_seed

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Updates:
    """The examples of each part of every update, and the batches of the parts of one process.

    Arguments:
        source: makes batches.
        sampler: decides the examples of each part; None: the seed and the batch size.
        batch_size: examples of an update, where there is no sampler.
        seed: of the run.
        parts: of an update, over all processes.
        mine: the parts of this process.
    """

    source: BatchSource
    sampler: Sampler | None
    batch_size: int
    seed: int
    parts: int
    mine: Sequence[int]

    def divided(self, number: int) -> list[list[int]]:
        """Return the examples of each part of an update."""
        if self.sampler is not None:
            return self.sampler.parts(number, self.seed)
        whole = examples_of(number, len(self.source), self.batch_size, self.seed)
        return [whole[part :: self.parts] for part in range(self.parts)]

    def __getitem__(self, number: int) -> list[Batch]:
        """Make the batches of this process's parts; all parts' generators begin in the same state."""
        divided, seed = self.divided(number), derive_seed(self.seed, "batch", number)
        return [self.source.batch(divided[part], torch.Generator().manual_seed(seed)) for part in self.mine]


@dataclass
class Batches:
    """Makes the batches of one update after another, ahead of time in `workers` processes; 0: on demand.

    Arguments:
        last: the number of updates.
        pinned: put batches of workers in pinned memory, from where they are copied to a GPU faster.
    """

    updates: Updates
    last: int
    workers: int = 0
    pinned: bool = False
    _next: int = field(default=-1, init=False)
    _ahead: Iterator[list[Batch] | AdvVLError] = field(default_factory=lambda: iter(()), init=False)

    def of(self, number: int) -> list[Batch]:
        """Return the batches of this process's parts of an update."""
        if self.workers == 0:
            return self.updates[number]
        if number != self._next:  # the first of a run, or of a resumed run
            self._ahead = iter(
                DataLoader(
                    _Guarded(self.updates),  # type: ignore[arg-type]
                    batch_size=None,
                    sampler=range(number, self.last),
                    num_workers=self.workers,
                    pin_memory=self.pinned,
                    collate_fn=_as_it_is,
                    worker_init_fn=_quiet,
                )
            )
        self._next = number + 1
        made = next(self._ahead)
        if isinstance(made, AdvVLError):
            raise made
        return made


@dataclass(frozen=True)
class _Guarded:
    """Batches, or the error from making them; raised in a worker it would be buried in the worker's traceback."""

    updates: Updates

    def __getitem__(self, number: int) -> list[Batch] | AdvVLError:
        try:
            return self.updates[number]
        except AdvVLError as error:
            return error


def _as_it_is(made: list[Batch] | AdvVLError) -> list[Batch] | AdvVLError:
    return made


def _quiet(worker: int) -> None:
    """Leave interrupts to the main process, which finishes its update and saves."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
