"""Sources of examples, from which a training loop draws its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from advvl.checks import shown
from advvl.errors import DataError


class BatchSource(Protocol):
    """Examples by number; deterministic given the indices and the generator."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Make the batch of these examples; all randomness comes from `generator` (CPU).

        Every part of an update gets a generator in the same state. Use it for draws that all parts share, such as the
        task, and `advvl.data.row_draws.RowDraws.of(indices, generator)` for draws of single examples: otherwise the
        rows of one process would repeat the draws of another.
        """


class Sampler(Protocol):
    """The examples of each update of a training loop, deterministic given its number and a seed."""

    @property
    def examples(self) -> int:
        """The number of examples that it draws from: that of the source."""

    def parts(self, update: int, seed: int) -> list[list[int]]:
        """Return the examples of each part of an update: of the micro-batches of all processes, as many in every update."""

    def updates(self, epochs: int, seed: int) -> int:
        """Return the number of updates in which each example has come `epochs` times."""


@dataclass(frozen=True)
class TensorSource:
    """Examples in memory.

    Arguments:
        tensors: name to (N, …), of which a batch has the rows.

    Raises:
        DataError: no tensor, or tensors of different lengths; at `batch`, an index outside 0..N-1.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping) or not all(isinstance(one, Tensor) for one in self.tensors.values()):
            raise DataError(f"expected a mapping from names to tensors, got {shown(self.tensors)}")
        lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"expected one or more tensors of the same length, got {lengths}; give each example a row")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        del generator
        rows = checked_rows(indices, len(self))
        return {name: tensor[rows] for name, tensor in self.tensors.items()}


def checked_rows(indices: Sequence[int], count: int) -> Tensor:
    """Return the indices as a tensor (B,), int64.

    Raises:
        DataError: no index, or one outside 0..count-1.
    """
    try:
        rows = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        rows = torch.tensor([])
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    if not whole or rows.ndim != 1 or rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= count:
        raise DataError(f"expected one or more indices in 0..{count - 1}, got {shown(indices)}")
    return rows.long()
