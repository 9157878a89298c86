"""VCR's questions with their right answers and rationales, for a second stage of pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import choice, flag, fraction
from advvl.data.masking import MASK_PROBABILITY
from advvl.data.row_draws import RowDraws
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import joined, pad_images, pad_texts
from advvl.data.uniter.corruption import WITH_LABELS, corrupt
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples
from advvl.data.uniter.datasets.vcr import Row, choice_row, regions_of, right_choice, row_length
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import word_pieces, word_pieces_of_four
from advvl.errors import DataError

Task = Literal["mlm", "mrfr", "mrc", "mrc-kl"]


@dataclass(frozen=True, eq=False)
class VCRPretrainingSource:
    """Questions for one task of `advvl.tasks.uniter.vcr.UniterForVCRPretraining`: a row with the right answer and rationale.

    Arguments:
        shards: their texts opened with `lengths="qar"`.
        task: "mlm", "mrfr", "mrc" or "mrc-kl".
        mask: of words or regions, the share that is hidden; at least one region, and one word each of the question, the
            answer and the rationale, is.
        rationales: give the rationale too.
        skip_bad: read every example once, and leave out and list those that cannot be used.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
        ConfigurationError: another task, a share out of its range.
    """

    shards: Sequence[Shard]
    task: Task
    mask: float = MASK_PROBABILITY
    rationales: bool = True
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choice(self, "task", Task)
        fraction(self, "mask")
        flag(self, "rationales", "skip_bad")
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The questions at `indices`, corrupted as by `PretrainingSource.batch`, with `txt_type_ids` (B, L)."""
        rows = checked_rows(indices, len(self))
        draws = RowDraws.of(rows, generator)
        items = self.examples.made(rows.tolist(), self._item)
        texts, images = pad_texts([row.ids for row, _ in items]), pad_images([regions for _, regions in items])
        batch = joined(texts, images)
        types = pad_sequence([torch.tensor(row.types) for row, _ in items], batch_first=True)
        meta = self.shards[0].texts.meta
        words = _segments(batch["input_ids"], batch["txt_lens"], meta.sep, 3 if self.rationales else 2)
        corrupted = corrupt(
            batch,
            images.labels,
            self.task,
            probability=self.mask,
            draws=draws,
            replacements=meta.words,
            words=words,
            mask=meta.mask,
        )
        return {**corrupted, "txt_type_ids": types}

    def _length(self, number: int, key: str) -> int:
        return row_length(self.shards[number], key, 4 if self.rationales else 3)

    def _item(self, number: int, key: str) -> tuple[Row, Regions]:
        shard = self.shards[number]
        record = shard.texts[key]
        answer = word_pieces_of_four(record, "input_ids_as")[right_choice(record, "qa_target")]
        rationale = None
        if self.rationales:
            rationale = word_pieces_of_four(record, "input_ids_rs")[right_choice(record, "qar_target")]
        regions = regions_of(shard, key, labels=self.task in WITH_LABELS)
        if self.task in WITH_LABELS and regions.labels is None:
            raise DataError(f"expected soft_labels of all regions for {self.task!r}, got none of some; use 'mrfr'")
        return choice_row(shard.texts.meta, word_pieces(record), answer, rationale), regions


def _segments(input_ids: Tensor, lengths: Tensor, sep: int, count: int) -> Tensor:
    """The words of the question, of the answer and of the rationale, `(count, B, L)` bool, without [CLS] and [SEP]."""
    place = torch.arange(input_ids.shape[1])
    real = (place > 0) & (place < lengths[:, None])
    ends = (input_ids == sep) & real
    segment = ends.cumsum(1)
    return torch.stack([real & ~ends & (segment == number) for number in range(count)])
