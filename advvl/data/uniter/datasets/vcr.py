"""VCR: four answers to a question, and four rationales of an answer; each choice is a row.

    answer      [CLS] question [SEP] answer [SEP]                   types 0 … 0 2 … 2
    rationale   [CLS] question [SEP] answer [SEP] rationale [SEP]   types 0 … 0 2 … 2 3 … 3

The regions of human-drawn boxes come before the detected ones. A question that names only one image has no human-drawn
boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import choice, flag, is_whole, shown
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import collate
from advvl.data.uniter.datasets.examples import Examples, ImageTable, Shard, number_examples, stacked
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import TextMeta, word_pieces, word_pieces_of_four
from advvl.errors import DataError

Split = Literal["val", "test"]
CHOICES = 4
QUESTION, ANSWER, RATIONALE = 0, 2, 3
"""The types of words; that of regions is 1."""


class Row(NamedTuple):
    """A text of the model, and the type of each of its tokens."""

    ids: list[int]
    types: list[int]


def choice_row(meta: TextMeta, question: list[int], answer: list[int], rationale: list[int] | None = None) -> Row:
    """Make the row of an answer, or of a rationale of it."""
    ids = [meta.cls, *question, meta.sep, *answer, meta.sep]
    types = [QUESTION] * (1 + len(question)) + [ANSWER] * (2 + len(answer))
    if rationale is None:
        return Row(ids, types)
    return Row([*ids, *rationale, meta.sep], types[:-1] + [RATIONALE] * (2 + len(rationale)))


@dataclass(frozen=True, eq=False)
class ChoiceSource:
    """VCR's questions to train `advvl.tasks.uniter.vcr.UniterForVCR`: four rows each, one per choice.

    Arguments:
        answers: shards of which the answers are asked, their texts opened with `lengths="qa"`; before those of rationales.
        rationales: shards of which the rationales of the right answer are asked, opened with `lengths="qar"`.
        skip_bad: read every example once, and leave out and list those that cannot be used.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
    """

    answers: Sequence[Shard]
    rationales: Sequence[Shard] = ()
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        flag(self, "skip_bad")
        shards = [*self.answers, *self.rationales]
        found = number_examples(shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The questions at `indices`.

        Returns:
            UNITER's fields, `txt_type_ids` (rows, L), 0 at padding, and `targets` (rows, 1) long, 1 for the right choice.
        """
        del generator
        items = self.examples.made(checked_rows(indices, len(self)).tolist(), self._item)
        targets = torch.cat([torch.arange(CHOICES) == right for _, _, right in items]).long()
        return {**_fields([(rows, regions) for rows, regions, _ in items]), "targets": targets[:, None]}

    def _length(self, number: int, key: str) -> int:
        specials = 3 if number < len(self.answers) else 4
        return CHOICES * row_length(self._shard(number), key, specials)

    def _shard(self, number: int) -> Shard:
        return [*self.answers, *self.rationales][number]

    def _item(self, number: int, key: str) -> tuple[list[Row], Regions, int]:
        shard = self._shard(number)
        record, meta = shard.texts[key], shard.texts.meta
        question, answers = word_pieces(record), word_pieces_of_four(record, "input_ids_as")
        right = right_choice(record, "qa_target")
        if number < len(self.answers):
            return [choice_row(meta, question, answer) for answer in answers], regions_of(shard, key), right
        rationales = word_pieces_of_four(record, "input_ids_rs")
        rows = [choice_row(meta, question, answers[right], rationale) for rationale in rationales]
        return rows, regions_of(shard, key), right_choice(record, "qar_target")


@dataclass(frozen=True, eq=False)
class ChoiceEvaluationSource:
    """VCR's questions with all choices, for evaluation.

    Arguments:
        shards: their texts opened with `lengths="qar"`.
        split: "val" has 8 rows of each question, four answers and four rationales of the right one; "test" 20, four
            answers and then four rationales of each.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
    """

    shards: Sequence[Shard]
    split: Split = "val"
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choice(self, "split", Split)
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The questions at `indices`: UNITER's fields of 8 or 20 rows each, `txt_type_ids`, and where they are known
        `qa_targets` and `qar_targets` (B, 1) long, the right answer and the right one of its rationales.
        """
        del generator
        items = self.examples.made(checked_rows(indices, len(self)).tolist(), self._item)
        fields = _fields([(rows, regions) for rows, regions, _ in items])
        for place, name in enumerate(("qa_targets", "qar_targets")):
            fields |= stacked(name, [None if right is None else right[place : place + 1] for _, _, right in items])
        return fields

    def _length(self, number: int, key: str) -> int:
        rows = 2 * CHOICES if self.split == "val" else CHOICES + CHOICES**2
        return rows * row_length(self.shards[number], key, 4)

    def _item(self, number: int, key: str) -> tuple[list[Row], Regions, Tensor | None]:
        shard = self.shards[number]
        record, meta = shard.texts[key], shard.texts.meta
        question = word_pieces(record)
        answers, rationales = (word_pieces_of_four(record, name) for name in ("input_ids_as", "input_ids_rs"))
        known = record.get("qa_target", -1) != -1
        right = (
            [right_choice(record, name) for name in ("qa_target", "qar_target")]
            if known or self.split == "val"
            else None
        )
        asked = [answers[right[0]]] if right is not None and self.split == "val" else answers
        rows = [choice_row(meta, question, answer) for answer in answers]
        rows += [choice_row(meta, question, answer, rationale) for answer in asked for rationale in rationales]
        return rows, regions_of(shard, key), None if right is None else torch.tensor(right)


def _fields(items: Sequence[tuple[Sequence[Row], Regions]]) -> dict[str, Any]:
    rows = [row for rows, _ in items for row in rows]
    fields: dict[str, Any] = collate([row.ids for row in rows], [regions for rows, regions in items for _ in rows])
    fields["txt_type_ids"] = pad_sequence([torch.tensor(row.types) for row in rows], batch_first=True)
    return fields


def row_length(shard: Shard, key: str, specials: int) -> int:
    """Return the tokens and regions of a question's row, with so many special tokens."""
    drawn, found = _images(shard, key)
    boxes = 0 if drawn is None else _drawn(shard).count(drawn)  # of a picture in which nothing is marked, none
    return shard.texts.lengths[key] + specials + boxes + shard.regions(found)


def regions_of(shard: Shard, key: str, *, labels: bool = False) -> Regions:
    """Read the regions of a question's image: the drawn boxes, if there are any, and then the detected ones."""
    drawn, found = _images(shard, key)
    detected = shard.images.read(found, labels=labels)
    if drawn is None or not _drawn(shard).count(drawn):
        return detected
    return _drawn(shard).read(drawn, labels=labels).followed_by(detected)


def _images(shard: Shard, key: str) -> tuple[str | None, str]:
    """The names of the human-drawn boxes, if there are any, and of the detected ones."""
    names = shard.texts.images[key]
    return (None, names) if isinstance(names, str) else names


def _drawn(shard: Shard) -> ImageTable:
    if shard.drawn is None:
        raise DataError(
            "expected the database of boxes that people drew, got none; "
            "give data.train_drawn and val_drawn, or drawn of Shard"
        )
    return shard.drawn


def right_choice(record: Mapping[str, Any], name: str) -> int:
    """Return the right answer or rationale of a record, 0 to 3.

    Raises:
        DataError: it is not known.
    """
    found: Any = record.get(name)
    if not is_whole(found) or found not in range(CHOICES):
        raise DataError(f"{name}: expected the right choice, 0 to 3, got {shown(found)}; is it of the test split?")
    return int(found)
