"""Random numbers that each row of a batch draws independently, so that a batch may be split over processes in any way.

Each number is a hash of a seed that all rows share, the row's example, the purpose of the draw and the position:
SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) in counter mode. It depends neither on other rows nor on the padding of
the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class RowDraws:
    """Draws for the rows of a batch; `keys` `(B,)` uint64, one per row. Made by `RowDraws.of`."""

    keys: NDArray[np.uint64]

    @classmethod
    def of(cls, indices: Sequence[int] | Tensor, generator: torch.Generator) -> RowDraws:
        """Make the draws of the examples `indices` `(B,)`; one number is taken from `generator`, for any number of rows."""
        shared = torch.randint(2**63 - 1, (1,), generator=generator).numpy().astype(np.uint64)
        return cls(_mixed(_mixed(shared) + _places(torch.as_tensor(indices, dtype=torch.long))))

    def uniform(self, purpose: str, width: int) -> Tensor:
        """Return numbers in [0, 1), `(B, width)` float64: the same ones at each call for the same purpose."""
        stream = _mixed(self.keys ^ np.uint64(zlib.crc32(purpose.encode())))
        bits = _mixed(stream[:, None] + _places(torch.arange(width)))
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _places(numbers: Tensor) -> NDArray[np.uint64]:
    return (numbers.numpy().astype(np.uint64) + np.uint64(1)) * _GOLDEN


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the input moves half of those of the output."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
