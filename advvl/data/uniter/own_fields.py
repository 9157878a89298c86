"""The values of a user's record: its texts, numbers, answers and boxes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from advvl.checks import shown
from advvl.data.boxes import in_parts, numbers
from advvl.data.uniter.own_tables import Fields, needed, plain
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import TextMeta, encoded
from advvl.data.whereabouts import within
from advvl.errors import DataError


@dataclass(frozen=True, eq=False)
class Words:
    """Makes word pieces of texts.

    Arguments:
        tokenizer: of tokenizers or transformers, with BERT's special tokens or RoBERTa's.
    """

    tokenizer: Any
    meta: TextMeta = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", TextMeta.of(self.tokenizer))

    def one(self, record: Mapping[str, Any], key: str) -> list[int]:
        """Return the word pieces of the text under a key."""
        return self._pieces(needed(record, key), key)

    def each(self, record: Mapping[str, Any], key: str, count: int | None = None) -> list[list[int]]:
        """Return the word pieces of each text of the list under a key: of so many, or of any number."""
        texts = plain(needed(record, key))
        if not isinstance(texts, list | tuple) or not texts or count not in (None, len(texts)):
            found = len(texts) if isinstance(texts, list | tuple) else shown(texts)
            raise DataError(f"{key}: expected a list of {count or 'one text or more'}, got {found}; correct it")
        return [self._pieces(text, f"{key}[{place}]") for place, text in enumerate(texts)]

    def captions(self, record: Mapping[str, Any], _: Sequence[Regions]) -> list[Fields]:
        """Return an example for each text of an image; `text` is one, or a list."""
        alone = isinstance(needed(record, "text"), str)
        return [{"input_ids": ids} for ids in ([self.one(record, "text")] if alone else self.each(record, "text"))]

    def _pieces(self, text: Any, key: str) -> list[int]:
        found = encoded(self.tokenizer, text) if isinstance(text, str) else []
        if not found:
            raise DataError(f"{key}: expected a text of one word or more, got {shown(text)}; correct it")
        return found


def number(record: Mapping[str, Any], key: str, count: int) -> int | None:
    """Return the whole number below `count` under a key, or None where there is none.

    Raises:
        DataError: another value.
    """
    given = record.get(key)
    if given is None:
        return None
    try:
        found = operator.index(plain(given))
    except TypeError:
        found = -1
    if not 0 <= found < count:
        raise DataError(f"{key}: expected a number in 0..{count - 1}, got {shown(given)}; correct it")
    return found


def scored(row: Tensor) -> dict[str, list[Any]]:
    """Return the scores of answers (A,) as a database has them: those above 0, with their numbers."""
    labels = row.nonzero()[:, 0]
    return {"labels": labels.tolist(), "scores": row[labels].tolist()}


def box_of(record: Mapping[str, Any], regions: Regions, target: int | None) -> list[float]:
    """Return the box that a text refers to, x, y, width and height relative to the image: its `box`, or that of its target.

    Raises:
        DataError: a `box` that is invalid or outside the image; neither `box` nor target.
    """
    if record.get("box") is None:
        if target is None:
            needed(record, "target")
        corners = regions.boxes[target, :4]
    else:
        with within("box"):
            given = numbers("box", record["box"])
            if given.shape != (4,):
                raise DataError(f"expected x1, y1, x2, y2, got shape {tuple(given.shape)}; give one box")
            corners = in_parts(given[None], record.get("size"))[0]
    left, top, right, bottom = corners.tolist()
    return [left, top, right - left, bottom - top]
