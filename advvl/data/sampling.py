"""Batches that fill a budget of tokens, including padding; their size follows from the lengths of their examples.

Source of the buckets: the published code of Chen et al., "UNITER", ECCV 2020. It fills little more than half of its
budget, because it keeps using the longest length of a bucket; `filling="uniter"` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advvl.checks import at_least, choice, shown
from advvl.errors import DataError
from advvl.runtime.randomness import derive_seed

Filling = Literal["full", "uniter"]
TooLong = Literal["refuse", "skip"]
Rows = NDArray[np.int64]

_KEPT_EPOCHS = 2


@dataclass(frozen=True, eq=False)
class TokenBuckets:
    """A sampler of micro-batches that each fill a budget of tokens; for `fit(…, sampler=…)`.

    The examples of an epoch are shuffled and parted into buckets, and each bucket is sorted by length and cut into
    micro-batches, which are shuffled again. Examples that do not fill a micro-batch go into the next bucket, so an
    epoch has every example once. An update takes the next `micro_batches` of them, across epochs, so it has the same
    examples on any number of processes.

    Arguments:
        lengths: (N,) whole numbers, the tokens and regions of each example as the model gets them.
        tokens: the budget of a micro-batch, its rows times the length of its longest.
        micro_batches: of an update: the number of processes times that of micro-batches of each.
        bucket: examples that are sorted together.
        multiple: the number of rows is a multiple of this if the budget allows.
        filling: "full", or "uniter", as published: a micro-batch is closed as if the next began with a bucket's longest
            example, and what is left of a bucket is dropped.
        too_long: an example that exceeds the budget on its own is refused, or skipped and listed.
        names: from an example's number to its name or place, for messages.

    Raises:
        DataError: lengths that are none, an example that is too long, none that is left; at `epoch`, with "uniter", too few
            examples for one micro-batch.
        ConfigurationError: an option of another type or out of its range.
    """

    lengths: Tensor
    tokens: int
    micro_batches: int = 1
    bucket: int = 8192
    multiple: int = 8
    filling: Filling = "full"
    too_long: TooLong = "refuse"
    names: InitVar[Callable[[int], str] | None] = None

    def __post_init__(self, names: Callable[[int], str] | None) -> None:
        at_least(1, self, "tokens", "micro_batches", "bucket", "multiple")
        choice(self, "filling", Filling)
        choice(self, "too_long", TooLong)
        lengths = self.lengths
        whole = isinstance(lengths, Tensor) and lengths.ndim == 1 and not lengths.is_floating_point()
        if not whole or not len(lengths) or int(lengths.min()) < 1:
            raise DataError(f"expected lengths (N,) of 1 or more, got {shown(lengths)}; is a row without tokens?")
        if len(self.skipped) == len(lengths) or (len(self.skipped) and self.too_long == "refuse"):
            first = int(self.skipped[0])
            raise DataError(
                f"expected examples of at most {self._longest} tokens, got {len(self.skipped)} longer ones, the first "
                f"{first if names is None else names(first)} of {int(lengths[first])}; "
                "raise the budget, or skip them"
            )
        object.__setattr__(self, "_epochs", {})
        object.__setattr__(self, "_starts", {})

    @property
    def examples(self) -> int:
        """The number of examples, with those that are skipped."""
        return len(self.lengths)

    @property
    def _longest(self) -> int:
        return self.tokens if self.filling == "full" else self.tokens // self.multiple

    @cached_property
    def skipped(self) -> tuple[int, ...]:
        """The examples that alone are over the budget."""
        return tuple((self.lengths > self._longest).nonzero()[:, 0].tolist())

    def parts(self, update: int, seed: int) -> list[list[int]]:
        """Return the examples of each micro-batch of an update."""
        first = update * self.micro_batches
        return [self._micro_batch(number, seed).tolist() for number in range(first, first + self.micro_batches)]

    def updates(self, epochs: int, seed: int) -> int:
        """Return the number of updates that reach the end of so many epochs."""
        return -(-self._start(epochs, seed) // self.micro_batches)

    def epoch(self, number: int, seed: int) -> list[Rows]:
        """Return the micro-batches of an epoch, in the order in which they come."""
        kept: dict[tuple[int, int], list[Rows]] = self._epochs  # type: ignore[attr-defined]
        if (number, seed) not in kept:
            while len(kept) >= _KEPT_EPOCHS:
                del kept[next(iter(kept))]
            kept[number, seed] = self._drawn(torch.Generator().manual_seed(derive_seed(seed, "buckets", number)))
        return kept[number, seed]

    def _micro_batch(self, number: int, seed: int) -> Rows:
        epoch = 0
        while self._start(epoch + 1, seed) <= number:
            epoch += 1
        return self.epoch(epoch, seed)[number - self._start(epoch, seed)]

    def _start(self, epoch: int, seed: int) -> int:
        """The number of micro-batches before an epoch."""
        starts: list[int] = self._starts.setdefault(seed, [0])  # type: ignore[attr-defined]
        while len(starts) <= epoch:
            starts.append(starts[-1] + len(self.epoch(len(starts) - 1, seed)))
        return starts[epoch]

    def _drawn(self, generator: torch.Generator) -> list[Rows]:
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        lengths = self.lengths.numpy()
        order = order[lengths[order] <= self._longest]
        cut: list[Rows] = []
        left = order[:0]
        for first in range(0, len(order), self.bucket):
            rows = np.concatenate([left, order[first : first + self.bucket]])
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
            if self.filling == "uniter":
                cut += _as_uniter(rows, lengths[rows], self.tokens, self.multiple)
                continue
            pieces = list(_full(rows, lengths[rows], self.tokens, self.multiple))
            last = first + self.bucket >= len(order)
            left = order[:0] if last or not pieces else pieces.pop()
            cut += pieces
        if not cut:
            raise DataError(
                f"expected examples that fill a micro-batch of {self.tokens} tokens, got {len(order)} that do not; "
                'lower the budget, or use filling="full"'
            )
        return [cut[place] for place in torch.randperm(len(cut), generator=generator).tolist()]


def _full(rows: Rows, lengths: Rows, tokens: int, multiple: int) -> Iterator[Rows]:
    """Cut rows, the longest first, into pieces that each fill the budget; the last piece is the rest."""
    place = 0
    while place < len(rows):
        size = tokens // int(lengths[place])
        size -= size % multiple if size >= multiple else 0
        yield rows[place : place + size]
        place += size


def _as_uniter(rows: Rows, lengths: Rows, tokens: int, multiple: int) -> Iterator[Rows]:
    """Cut rows, the longest first, as published: every piece counts the length of the bucket's longest row."""
    first, longest = 0, 0
    for place in range(0, len(rows), multiple):
        longest = max(longest, int(lengths[place]))
        if longest * (place - first + multiple) > tokens:
            yield rows[first:place]
            first = place
