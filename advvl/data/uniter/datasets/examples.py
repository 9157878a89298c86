"""The examples of several databases, numbered on from one to the next, and what all of UNITER's sources ask of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from advvl.data.uniter.image_db import ImageDb
from advvl.data.uniter.text_db import TextDb
from advvl.data.whereabouts import within
from advvl.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Shard:
    """A database of texts, and that of the images they are about.

    Arguments:
        drawn: of VCR, the boxes that people drew, whose regions come before those of `images`.
    """

    texts: TextDb
    images: ImageDb
    drawn: ImageDb | None = None

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
        number, key = self.at(index)
        with within(self.shards[number].texts.where(key)):
            return make(number, key)

    def key(self, index: int) -> str:
        """Return an example's key, for what is predicted of it."""
        return self.at(index)[1]


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
    lengths, skipped = [], []
    for number, shard in enumerate(shards):
        keys.append([])
        for key in shard.texts.lengths:
            try:
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
        raise DataError(
            f"expected one example or more, got {len(skipped)} that cannot be used; the first is {skipped[0]!r}"
        )
    return Examples(tuple(shards), keys, torch.tensor(lengths), skipped)


def check_shards(shards: Sequence[Shard]) -> None:
    """Raise DataError unless there is a shard, and all have one tokenizer and as many features of each region."""
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
    """Return the field of the targets of a batch, a row for each; none where no example has one.

    Raises:
        DataError: some have one and some have not.
    """
    known = [target for target in targets if target is not None]
    if 0 < len(known) < len(targets):
        raise DataError(f"expected {name} of all examples of a batch or of none, got {len(known)} of {len(targets)}")
    return {name: torch.stack(known)} if known else {}
