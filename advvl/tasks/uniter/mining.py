"""Both sides of hard negatives: each match with other images, and with other texts.

Source: Chen et al., "UNITER", ECCV 2020, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from advvl.checks import at_least
from advvl.data.source import checked_rows
from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs
from advvl.errors import ConfigurationError, DataError
from advvl.fit.schedules import examples_of, updates_per_epoch


@dataclass(frozen=True, eq=False)
class TwoSides:
    """Candidates in twos, for `HardestSource`: example 2i is pair i with other images, 2i + 1 with other texts.

    Arguments:
        pairs: made of shards of captions and images.
        count: mismatches to choose from.
        published: lay out an image's texts by the length of the last one, as `HardNegativeSource` says.
    """

    pairs: Pairs
    count: int = 399
    published: bool = False

    def __post_init__(self) -> None:
        sides = tuple(HardNegativeSource(self.pairs, side, self.count, self.published) for side in ("images", "texts"))
        object.__setattr__(self, "_sides", sides)

    def __len__(self) -> int:
        return 2 * len(self.pairs.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The match at the one index and its mismatches, as of `HardNegativeSource`.

        Raises:
            DataError: several indices.
        """
        rows = checked_rows(indices, len(self)).tolist()
        if len(rows) != 1:
            raise DataError(f"expected one example at a time, got {len(rows)}; give BothSides as the sampler")
        source: HardNegativeSource = self._sides[rows[0] % 2]  # type: ignore[attr-defined]
        return source.batch([rows[0] // 2], generator)


@dataclass(frozen=True)
class BothSides:
    """A sampler for `TwoSides`: each match of an update is two micro-batches, one for either side.

    Arguments:
        examples: of the source, two for each pair.
        micro_batches: of an update: the number of processes times that of micro-batches of each.

    Raises:
        ConfigurationError: numbers that are odd, or below 2.
    """

    examples: int
    micro_batches: int

    def __post_init__(self) -> None:
        at_least(2, self, "examples", "micro_batches")
        if self.examples % 2 or self.micro_batches % 2:
            raise ConfigurationError(f"expected even numbers of examples and micro_batches, got {self}")

    def parts(self, update: int, seed: int) -> list[list[int]]:
        """Return the examples of each micro-batch of an update."""
        matches = examples_of(update, self.examples // 2, self.micro_batches // 2, seed)
        if len(matches) < self.micro_batches // 2:
            raise DataError(
                f"expected {self.micro_batches // 2} pairs or more, got {len(matches)}; use fewer micro_batches"
            )
        return [[2 * match + side] for match in matches for side in (0, 1)]

    def updates(self, epochs: int, seed: int) -> int:
        """Return the number of updates of so many epochs."""
        del seed
        return epochs * updates_per_epoch(self.examples // 2, self.micro_batches // 2)
