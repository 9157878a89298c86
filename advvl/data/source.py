"""Sources of examples: what a training loop draws its batches from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from advvl.errors import DataError


def checked_rows(indices: Sequence[int], count: int) -> Tensor:
    """Return the indices as a tensor (B,), int64.

    Raises:
        DataError: no index, or one outside 0..count-1.
    """
    rows = torch.as_tensor(indices, dtype=torch.long)
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= count:
        raise DataError(f"expected one or more indices in 0..{count - 1}, got {list(indices)}")
    return rows


class BatchSource(Protocol):
    """Examples by number; deterministic given the indices and the generator."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The batch of these examples; whatever is random in it is drawn from `generator` (CPU).

        Every part of an update gets a generator in the same state. Draw from it what the parts share, such as a task, and
        what an example has of its own from `advvl.data.row_draws.RowDraws.of(indices, generator)`: otherwise the rows of
        one process draw what those of another draw.
        """
