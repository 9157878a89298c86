"""Several sources as one, with each update from a single source: the mixing of tasks by ratio.

    tasks = {"mlm": words, "itm": matches}
    source = MixedSource(tasks)
    sampler = MixedSampler({name: TokenBuckets(task.lengths, 10240) for name, task in tasks.items()}, {"mlm": 2, "itm": 1})
    fit(model, source, sampler=sampler, …)

Source: the published code of Chen et al., "UNITER", ECCV 2020, draws a task for each update as this does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from advvl.checks import is_whole, shown
from advvl.data.source import BatchSource, Sampler, checked_rows
from advvl.errors import ConfigurationError, DataError
from advvl.runtime.randomness import derive_seed

_BLOCK = 4096  # updates whose tasks are drawn together


@dataclass(frozen=True, eq=False)
class MixedSource:
    """Sources by name, their examples numbered on from one to the next.

    Raises:
        DataError: no source; at `batch`, examples of several.
    """

    sources: Mapping[str, BatchSource]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("expected one source or more to mix, got none")

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(map(len, self.sources.values()))]

    def __len__(self) -> int:
        return self._starts[-1]

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Make the batch of these examples, which are all of one source."""
        rows = checked_rows(indices, len(self))
        first, last = (bisect_right(self._starts, int(row)) - 1 for row in rows.aminmax())
        if first != last:
            raise DataError(f"expected examples of one source, got some of {len(self.sources)}; give a MixedSampler")
        source = list(self.sources.values())[first]
        return source.batch((rows - self._starts[first]).tolist(), generator)


@dataclass(frozen=True, eq=False)
class MixedSampler:
    """A sampler that draws one of several samplers for each update.

    Arguments:
        samplers: by name, in the order of `MixedSource.sources`; all with the same number of parts.
        ratios: an integer for each, proportional to how often it is drawn.

    Raises:
        ConfigurationError: no sampler, other names in `ratios`, a ratio below 1.
    """

    samplers: Mapping[str, Sampler]
    ratios: Mapping[str, int]

    def __post_init__(self) -> None:
        if not self.samplers or set(self.samplers) != set(self.ratios):
            raise ConfigurationError(
                f"expected a ratio for each of {', '.join(self.samplers) or 'one sampler or more'}, got {shown(self.ratios)}"
            )
        for name, ratio in self.ratios.items():
            if not is_whole(ratio) or ratio < 1:
                raise ConfigurationError(
                    f"expected a whole number of 1 or more as the ratio of {name!r}, got {shown(ratio)}"
                )
        object.__setattr__(self, "_blocks", {})

    @property
    def examples(self) -> int:
        """The number of examples of all samplers."""
        return sum(sampler.examples for sampler in self.samplers.values())

    def parts(self, update: int, seed: int) -> list[list[int]]:
        """Return the examples of each part of an update, all of one sampler: of that sampler's next update."""
        tasks, before = self._block(update // _BLOCK, seed)
        place = update % _BLOCK
        task = int(tasks[place])
        number = int(before[task]) + int((tasks[:place] == task).sum())
        samplers = list(self.samplers.values())
        start = sum(sampler.examples for sampler in samplers[:task])
        parts = samplers[task].parts(number, derive_seed(seed, "task", task))
        return [[start + example for example in part] for part in parts]

    def updates(self, epochs: int, seed: int) -> int:
        """Return the sum of the samplers' updates."""
        samplers = enumerate(self.samplers.values())
        return sum(sampler.updates(epochs, derive_seed(seed, "task", task)) for task, sampler in samplers)

    def _block(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """The tasks of a block of updates, (_BLOCK,), and how many updates each task had before it, (tasks,)."""
        blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = self._blocks  # type: ignore[attr-defined]
        for block in range(number + 1):
            if (block, seed) not in blocks:
                pool = torch.tensor([task for task, name in enumerate(self.samplers) for _ in range(self.ratios[name])])
                generator = torch.Generator().manual_seed(derive_seed(seed, "mixture", block))
                tasks = pool[torch.randint(len(pool), (_BLOCK,), generator=generator)]
                before = torch.zeros(len(self.samplers), dtype=torch.long)
                if block:
                    earlier, counts = blocks[block - 1, seed]
                    before = counts + torch.bincount(earlier, minlength=len(self.samplers))
                blocks[block, seed] = tasks, before
        return blocks[number, seed]
