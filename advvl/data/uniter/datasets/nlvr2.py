"""NLVR2: sentences about two images, as two rows of the encoder or as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import choice, flag, is_whole, shown
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import collate
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples, stacked
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.text_db import word_pieces
from advvl.errors import DataError

Layout = Literal["paired", "triplet"]
LEFT, RIGHT = 1, 2
"""The types of the regions of the left and of the right image."""


@dataclass(frozen=True, eq=False)
class PairSource:
    """Sentences about two images for `advvl.tasks.uniter.nlvr2.UniterForNLVR2`.

    Arguments:
        shards: databases of sentences and of images.
        layout: "paired", two rows of the encoder for each sentence, its left and its right image's; "triplet", one row
            with the regions of both.
        image_types: give regions the type of their image, as all released configurations do.
        skip_bad: read every example once, and leave out and list those that cannot be used.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
    """

    shards: Sequence[Shard]
    layout: Layout = "paired"
    image_types: bool = True
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choice(self, "layout", Layout)
        flag(self, "image_types", "skip_bad")
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The sentences at `indices`.

        Returns:
            UNITER's fields, `img_type_ids` (rows, R), 0 at padding, and `targets` (B,) long, 1 for true, where they are
            known. Paired rows alternate: 2i has the left image of sentence i, 2i + 1 the right one.
        """
        del generator
        items = self.examples.made(checked_rows(indices, len(self)).tolist(), self._item)
        texts, images, types = [], [], []
        for text, left, right, _ in items:
            left_types, right_types = torch.full((len(left),), LEFT), torch.full((len(right),), RIGHT)
            if self.layout == "paired":
                texts += [text, text]
                images += [left, right]
                types += [left_types, right_types]
            else:
                texts.append(text)
                images.append(left.followed_by(right))
                types.append(torch.cat([left_types, right_types]))
        fields = collate(texts, images)
        if self.image_types:
            fields["img_type_ids"] = pad_sequence(types, batch_first=True)
        return {**fields, **stacked("targets", [target for *_, target in items])}

    def _length(self, number: int, key: str) -> int:
        shard = self.shards[number]
        words = shard.texts.lengths[key] + 2
        left, right = map(shard.regions, shard.two_images(key))
        return 2 * (words + max(left, right)) if self.layout == "paired" else words + left + right

    def _item(self, number: int, key: str) -> tuple[list[int], Regions, Regions, Tensor | None]:
        shard = self.shards[number]
        record = shard.texts[key]
        target = record.get("target")
        if target is not None and not (is_whole(target) and target in (0, 1)):
            raise DataError(f"expected a target of 0 or 1, got {shown(target)}; correct it")
        left, right = map(shard.images.read, shard.two_images(key))
        return (
            shard.within_text(word_pieces(record)),
            left,
            right,
            None if target is None else torch.tensor(target),
        )
