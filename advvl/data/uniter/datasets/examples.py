"""The examples of several databases, numbered consecutively, and the interfaces that UNITER's sources need."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import TextMeta
from advvl.data.whereabouts import within
from advvl.errors import DataError

T = TypeVar("T")


class TextTable(Protocol):
    """Texts by key: `advvl.data.uniter.text_db.TextDb`, or a person's own records."""

    @property
    def folder(self) -> object:
        """The place of the texts, for messages."""

    @property
    def meta(self) -> TextMeta:
        """The tokeniser that they were made with."""

    @property
    def lengths(self) -> Mapping[str, int]:
        """Word pieces without special tokens, by key."""

    @property
    def images(self) -> Mapping[str, str | tuple[str, str]]:
        """The image of a text, or its two images."""

    @property
    def skipped(self) -> Sequence[str]:
        """Reasons why examples were left out when the texts were read."""

    def __getitem__(self, key: str, /) -> Mapping[str, Any]:
        """Return the record of a text."""

    def where(self, key: str) -> str:
        """Return the place of a record, for messages."""

    def table(self, name: str) -> list[Any]:
        """Return a table of referring expressions, such as "images"."""


class ImageTable(Protocol):
    """Regions of images by name: `advvl.data.uniter.image_db.ImageDb`, or a person's own."""

    @property
    def folder(self) -> object:
        """The place of the images, for messages."""

    @property
    def feature_dim(self) -> int:
        """The number of features of each region."""

    def count(self, name: str) -> int:
        """Return the number of an image's regions; a DataError where there is no such image."""

    def read(self, name: str, *, labels: bool = False) -> Regions:
        """Return an image's regions, with their distributions over classes where asked."""

    def where(self, name: str) -> str:
        """Return the place of an image, for messages."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Texts, and the images they are about.

    Arguments:
        texts, images: databases, or a person's own records.
        drawn: for VCR, the human-drawn boxes, whose regions come before those of `images`.
    """

    texts: TextTable
    images: ImageTable
    drawn: ImageTable | None = None

    def image(self, key: str) -> str:
        """Return the name of an example's one image.

        Raises:
            DataError: it has two.
        """
        names = self.texts.images[key]
        if not isinstance(names, str):
            raise DataError(f"expected one image of an example, got {names}; is the database of another task?")
        return names

    def two_images(self, key: str) -> tuple[str, str]:
        """Return the names of an example's two images.

        Raises:
            DataError: it has one.
        """
        names = self.texts.images[key]
        if isinstance(names, str):
            raise DataError(f"expected two images of an example, got {names!r}; is the database of another task?")
        return names

    def regions(self, name: str) -> int:
        """Return the number of an image's regions.

        Raises:
            DataError: there is no such image, or it has no region.
        """
        count = self.images.count(name)
        if not count:
            raise DataError(f"expected a region of {name!r} in {str(self.images.folder)!r}, got none; leave it out")
        return count

    def within_text(self, ids: Sequence[int]) -> list[int]:
        """Return word pieces between [CLS] and [SEP]."""
        return [self.texts.meta.cls, *ids, self.texts.meta.sep]


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of shards, by number.

    Arguments:
        shards: one or more.
        keys: of each shard, those of its examples.
        lengths: (N,) long, tokens and regions of all rows that an example has in a batch, padded to its longest.
        skipped: what is wrong with the examples left out.
    """

    shards: Sequence[Shard]
    keys: Sequence[Sequence[str]]
    lengths: Tensor
    skipped: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [0, *accumulate(map(len, self.keys))])

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, index: int) -> tuple[int, str]:
        """Return the number of an example's shard, and its key there."""
        starts: list[int] = self._starts  # type: ignore[attr-defined]
        number = bisect_right(starts, index) - 1
        return number, self.keys[number][index - starts[number]]

    def made(self, indices: Iterable[int], make: Callable[[int, str], T]) -> list[T]:
        """Make something of each example; a DataError names the record."""
        return [self._one(index, make) for index in indices]

    def _one(self, index: int, make: Callable[[int, str], T]) -> T:
        with within(self.where(index)):
            return make(*self.at(index))

    def key(self, index: int) -> str:
        """Return an example's key, for what is predicted of it."""
        return self.at(index)[1]

    def where(self, index: int) -> str:
        """Return the place of an example's record, for messages."""
        number, key = self.at(index)
        return self.shards[number].texts.where(key)


def number_examples(
    shards: Sequence[Shard],
    length: Callable[[int, str], int],
    check: Callable[[int, str], Any],
    *,
    skip_bad: bool,
) -> Examples:
    """Number the examples of shards.

    Arguments:
        length: of the example of a shard's number and a key; it raises DataError where the example cannot be used.
        check: makes all that a batch has of an example, or raises DataError.
        skip_bad: make all of every example once, and leave out and list those that raise.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; no shard; shards of different tokenizers or
            numbers of features; no example that is left.
    """
    check_shards(shards)
    keys: list[list[str]] = []
    lengths: list[int] = []
    skipped = [reason for shard in shards for reason in shard.texts.skipped]
    for number, shard in enumerate(shards):
        keys.append([])
        for key in shard.texts.lengths:
            try:
                if shard.texts.lengths[key] < 1:
                    raise DataError("expected one word piece or more, got none; leave the example out")
                found = length(number, key)
                if skip_bad:
                    check(number, key)
            except DataError as error:
                if not skip_bad:
                    raise DataError(f"{shard.texts.where(key)}: {error}") from error
                skipped.append(f"{shard.texts.where(key)}: {error}")
            else:
                keys[-1].append(key)
                lengths.append(found)
    if not lengths:
        first = f"; the first is {skipped[0]!r}" if skipped else ""
        raise DataError(f"expected one example or more, got {len(skipped)} that cannot be used{first}")
    return Examples(tuple(shards), keys, torch.tensor(lengths), skipped)


def check_shards(shards: Sequence[Shard]) -> None:
    """Raise DataError unless there is a shard, and all have the same tokenizer and number of features per region."""
    if not shards or not all(isinstance(shard, Shard) for shard in shards):
        raise DataError("expected one Shard(texts, images) or more in a list, got none; open databases")
    first = shards[0]
    for shard in shards:
        first.texts.meta.check_same(shard.texts.meta, (first.texts.folder, shard.texts.folder))
        for images in (shard.images, shard.drawn):
            if images is not None and images.feature_dim != first.images.feature_dim:
                raise DataError(
                    f"expected {first.images.feature_dim} features of each region as in {str(first.images.folder)!r}, got "
                    f"{images.feature_dim} in {str(images.folder)!r}; take databases of one extraction"
                )


def stacked(name: str, targets: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Return the field of the targets of a batch, one row per example; no field if no example has a target.

    Raises:
        DataError: some have one and some have not.
    """
    known = [target for target in targets if target is not None]
    if 0 < len(known) < len(targets):
        raise DataError(f"expected {name} of all examples of a batch or of none, got {len(known)} of {len(targets)}")
    return {name: torch.stack(known)} if known else {}
