"""Captions and their images for pre-training, one task per source; `advvl.data.mixing` mixes several by ratio.

Source: Chen et al., "UNITER", ECCV 2020, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from advvl.checks import check_functions, choice, fraction
from advvl.data.masking import MASK_PROBABILITY, NEGATIVE_PROBABILITY, mismatch
from advvl.data.row_draws import RowDraws
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import Images, Texts, joined, pad_images, pad_texts
from advvl.data.uniter.corruption import WITH_LABELS, Task, corrupt
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import word_pieces
from advvl.errors import ConfigurationError, DataError


@dataclass(frozen=True, eq=False)
class PretrainingSource:
    """Captions for one task of `advvl.tasks.uniter.pretraining.UniterForPretraining`.

    Arguments:
        shards: databases of captions and of images; a wrong image is drawn from those of the caption's own shard.
        task: "mlm", "itm", "mrfr", "mrc" or "mrc-kl".
        mask: of words or regions, the share that is hidden; at least one of each row is.
        wrong: of "itm", the share of captions that get another image.
        skip_bad: read every example once, and leave out and list those that cannot be used.
        negatives: of "itm", makes its batches from this source, the rows and their draws, such as
            `advvl.tasks.uniter.synthesised.HardNegatives`; None: `wrong` of them show another image, drawn from all.

    The examples' lengths are those of the captions with their images; of "itm" with the largest image that they may get, so
    that a batch keeps within its budget of tokens whatever images are drawn for it.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
        ConfigurationError: another task, a share out of its range, negatives of another task than "itm".
    """

    shards: Sequence[Shard]
    task: Task
    mask: float = MASK_PROBABILITY
    wrong: float = NEGATIVE_PROBABILITY
    skip_bad: bool = False
    negatives: Callable[[PretrainingSource, Tensor, RowDraws], dict[str, Any]] | None = None
    examples: Examples = field(init=False, repr=False)
    image_pools: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choice(self, "task", Task)
        fraction(self, "mask", "wrong")
        check_functions(negatives=self.negatives)
        if self.negatives is not None and self.task != "itm":
            raise ConfigurationError(f"expected negatives for task 'itm' alone, got {self.task!r}; leave them out")
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        pools = [
            list(dict.fromkeys(map(shard.image, keys))) for shard, keys in zip(self.shards, found.keys, strict=True)
        ]
        if self.task == "itm":
            found = replace(found, lengths=_largest(found, pools))
        images = [(number, name) for number, pool in enumerate(pools) for name in pool]
        object.__setattr__(self, "examples", found)
        object.__setattr__(self, "_images", images)
        object.__setattr__(self, "_numbers", {image: number for number, image in enumerate(images)})
        object.__setattr__(self, "image_pools", torch.tensor([number for number, _ in images]))
        if self.task == "itm" and any(len(pool) == 1 for pool in pools):
            raise DataError("expected two images or more in each shard, to draw a wrong one from, got one; join them")

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The captions at `indices`, corrupted for the task, whose name is under `"task"`.

        Returns:
            UNITER's fields and, of "mlm" `txt_labels` (B, L); of "itm" `targets` (B,), 1 for a match; of the others
            `img_masks` (B, R), `img_mask_tgt` (B, S), and `feat_targets` (N, F) or `label_targets` (N, C).
        """
        rows = checked_rows(indices, len(self))
        draws = RowDraws.of(rows, generator)
        if self.negatives is not None:
            return {**self.negatives(self, rows, draws), "task": self.task}
        if self.task == "itm":
            _, shown, matched = self.mismatches(rows, draws)
            return {**joined(self.read_texts(rows), self.read_images(shown)), "targets": matched, "task": self.task}
        items = self.examples.made(rows.tolist(), self._item)
        images = pad_images([regions for _, regions in items])
        batch = joined(pad_texts([ids for ids, _ in items]), images)
        place = torch.arange(batch["input_ids"].shape[1])
        words = (place > 0) & (place < batch["txt_lens"][:, None] - 1)
        meta = self.shards[0].texts.meta
        return corrupt(
            batch,
            images.labels,
            self.task,
            probability=self.mask,
            draws=draws,
            replacements=meta.words,
            words=words,
            mask=meta.mask,
        )

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        return self.shards[0].texts.meta.mask

    def read_texts(self, rows: Tensor) -> Texts:
        """Return the captions of examples `(B,)`."""
        return pad_texts(self.examples.made(rows.tolist(), lambda number, key: self._text(self.shards[number], key)))

    def read_images(self, numbers: Tensor) -> Images:
        """Return the images of numbers `(B,)`: those of the captions are numbered, shard by shard."""
        images: list[tuple[int, str]] = self._images  # type: ignore[attr-defined]
        chosen = [images[number] for number in numbers.tolist()]
        return pad_images([self.shards[number].images.read(name) for number, name in chosen])

    def mismatches(self, rows: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the images to show with captions.

        Arguments:
            rows: the captions' examples, `(B,)`.

        Returns:
            The numbers of their own images `(B,)` and of those to show `(B,)`, and the labels `(B,)`: 1 for a match.
        """
        numbers: dict[tuple[int, str], int] = self._numbers  # type: ignore[attr-defined]
        at = [self.examples.at(row) for row in rows.tolist()]
        own = torch.tensor([numbers[number, self.shards[number].image(key)] for number, key in at])
        pools = torch.tensor([number for number, _ in at])
        first, count = torch.searchsorted(self.image_pools, pools), torch.bincount(self.image_pools)[pools]
        shown, targets = mismatch(own - first, count, probability=self.wrong, draws=draws)
        return own, shown + first, targets

    def _length(self, number: int, key: str) -> int:
        shard = self.shards[number]
        return shard.texts.lengths[key] + 2 + shard.regions(shard.image(key))

    def _item(self, number: int, key: str) -> tuple[list[int], Regions]:
        shard = self.shards[number]
        regions = shard.images.read(shard.image(key), labels=self.task in WITH_LABELS)
        if self.task in WITH_LABELS and regions.labels is None:
            raise DataError(f"{shard.images.where(shard.image(key))}: expected soft_labels for {self.task!r}, got none")
        return self._text(shard, key), regions

    def _text(self, shard: Shard, key: str) -> list[int]:
        return shard.within_text(word_pieces(shard.texts[key]))


def _largest(examples: Examples, pools: Sequence[Sequence[str]]) -> Tensor:
    """Return the lengths (N,) of examples with the largest image of their shard, of which `pools` has the names."""
    lengths = []
    for shard, keys, pool in zip(examples.shards, examples.keys, pools, strict=True):
        most = max(map(shard.regions, pool), default=0)
        lengths += [shard.texts.lengths[key] + 2 + most for key in keys]
    return torch.tensor(lengths)
