"""Questions with scored answers: VQA, and visual entailment, whose answers are contradiction, entailment and neutral."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advvl.checks import at_least
from advvl.data.source import checked_rows
from advvl.data.targets import soft_targets
from advvl.data.uniter.batching import collate
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples, stacked
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.text_db import word_pieces


@dataclass(frozen=True, eq=False)
class AnswerSource:
    """Questions for `advvl.tasks.uniter.vqa.UniterForVQA`.

    Arguments:
        shards: databases of questions and of images.
        num_answers: A: 3129 of VQA, 3 of visual entailment.
        skip_bad: read every example once, and leave out and list those that cannot be used.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
    """

    shards: Sequence[Shard]
    num_answers: int
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        at_least(1, self, "num_answers")
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The questions at `indices`: UNITER's fields, and `targets` (B, A) where answers are known."""
        del generator
        items = self.examples.made(checked_rows(indices, len(self)).tolist(), self._item)
        fields = collate([text for text, _, _ in items], [regions for _, regions, _ in items])
        return {**fields, **stacked("targets", [target for _, _, target in items])}

    def _length(self, number: int, key: str) -> int:
        shard = self.shards[number]
        return shard.texts.lengths[key] + 2 + shard.regions(shard.image(key))

    def _item(self, number: int, key: str) -> tuple[list[int], Regions, Tensor | None]:
        shard = self.shards[number]
        record = shard.texts[key]
        target = record.get("target")
        scores = None if target is None else soft_targets([target], self.num_answers)[0]
        return shard.within_text(word_pieces(record)), shard.images.read(shard.image(key)), scores
