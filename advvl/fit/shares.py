"""An update's batch, cut into parts over processes and micro-batches, and what the loss of each part weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advvl.data.source import BatchSource
from advvl.errors import ConfigurationError, DataError

Count = Callable[[Mapping[str, Any]], "int | Tensor"]


@dataclass
class Share:
    """One part of an update: its number, examples and batch, and what its mean loss weighs among those of all parts.

    Arguments:
        rows: the weight of a mean over its rows.
        entries: the weight of a mean over what `count` counts; None: nothing counts it.
        weight: of the two, the one for the loss that was weighed last.
        empty: parts of the update, of all processes, in which `count` counts nothing.
    """

    number: int
    examples: list[int]
    batch: Mapping[str, Any]
    rows: float
    entries: float | None = None
    weight: float = 1.0
    empty: int = 0

    def weigh(self, loss: Tensor) -> Tensor:
        """Note the weight of a loss, a scalar or one per row, and return the loss.

        Raises:
            ConfigurationError: a scalar that nothing counts, where there are other parts; losses that are not one per row.
            DataError: a scalar, and a part of any process without an entry.
        """
        if self.rows == 1:
            return loss
        if loss.ndim == 0 and self.entries is None:
            raise ConfigurationError(
                "expected one loss per row (B,), or count=…, got a scalar and no count; "
                "see docs/training-loop.md#several-processes"
            )
        if loss.ndim == 0 and self.empty:
            raise DataError(
                f"expected count(batch) of 1 or more in each part of an update, got less in {self.empty}; "
                "use fewer parts, or a larger batch_size"
            )
        if loss.ndim and len(loss) % len(self.examples):
            raise ConfigurationError(
                f"expected a scalar loss or one for each of {len(self.examples)} rows, got {tuple(loss.shape)}; reduce it"
            )
        self.weight = self.rows if loss.ndim or self.entries is None else self.entries
        return loss


def cut(
    source: BatchSource,
    examples: Sequence[int],
    *,
    seed: int,
    parts: int,
    mine: Sequence[int],
    count: Count | None,
    total: Callable[..., list[float]],
) -> list[Share]:
    """Cut out the parts of an update that are `mine`: part p of P has every P-th of its examples, from the p-th on.

    Arguments:
        seed: of each part's generator.
        count: how many entries the mean loss of a batch is over; None: nobody asks, or it is one loss per row.
        total: sums numbers over the processes.
    """
    shares = []
    for part in mine:
        own = list(examples[part::parts])
        batch = source.batch(own, torch.Generator().manual_seed(seed))
        shares.append(Share(part, own, batch, len(own) / len(examples)))
    if parts > 1 and count is not None:
        counts = [float(count(share.batch)) for share in shares]
        entries, empty = total(sum(counts), sum(number < 1 for number in counts))
        for share, number in zip(shares, counts, strict=True):
            share.entries, share.empty = number / max(entries, 1.0), int(empty)
    return shares
