"""Captions and their images for pre-training, one task per source; `advvl.data.mixing` mixes several by ratio.

Source: Chen et al., "UNITER", ECCV 2020, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from advvl.checks import choice, fraction
from advvl.data.masking import MASK_PROBABILITY, NEGATIVE_PROBABILITY, mismatch
from advvl.data.row_draws import RowDraws
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import joined, pad_images, pad_texts
from advvl.data.uniter.corruption import WITH_LABELS, Task, corrupt
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import word_pieces
from advvl.errors import DataError


@dataclass(frozen=True, eq=False)
class PretrainingSource:
    """Captions for one task of `advvl.tasks.uniter.pretraining.UniterForPretraining`.

    Arguments:
        shards: databases of captions and of images; a wrong image is drawn from those of the caption's own shard.
        task: "mlm", "itm", "mrfr", "mrc" or "mrc-kl".
        mask: of words or regions, the share that is hidden; at least one of each row is.
        wrong: of "itm", the share of captions that get another image.
        skip_bad: read every example once, and leave out and list those that cannot be used.

    The examples' lengths are those of the captions with their images; of "itm" with the largest image that they may get, so
    that a batch keeps within its budget of tokens whatever images are drawn for it.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
        ConfigurationError: another task, a share out of its range.
    """

    shards: Sequence[Shard]
    task: Task
    mask: float = MASK_PROBABILITY
    wrong: float = NEGATIVE_PROBABILITY
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choice(self, "task", Task)
        fraction(self, "mask", "wrong")
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        pools = [
            list(dict.fromkeys(map(shard.image, keys))) for shard, keys in zip(self.shards, found.keys, strict=True)
        ]
        if self.task == "itm":
            found = replace(found, lengths=_largest(found, pools))
        object.__setattr__(self, "examples", found)
        object.__setattr__(self, "_pools", pools)
        object.__setattr__(self, "_places", [{name: n for n, name in enumerate(pool)} for pool in pools])
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
        matched = torch.ones(len(rows), dtype=torch.long)
        if self.task == "itm":
            names, matched = self._names(rows, draws)
            shards = [self.shards[self.examples.at(row)[0]] for row in rows.tolist()]
            texts = self.examples.made(rows.tolist(), lambda number, key: self._text(self.shards[number], key))
            regions = [shard.images.read(name) for shard, name in zip(shards, names, strict=True)]
        else:
            items = self.examples.made(rows.tolist(), self._item)
            texts, regions = [item[0] for item in items], [item[1] for item in items]
        images = pad_images(regions)
        batch = joined(pad_texts(texts), images)
        if self.task == "itm":
            return {**batch, "targets": matched, "task": self.task}
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

    def _names(self, rows: Tensor, draws: RowDraws) -> tuple[list[str], Tensor]:
        """The image to show with each caption, and 1 where it is its own."""
        pools, places = self._pools, self._places  # type: ignore[attr-defined]
        at = [self.examples.at(row) for row in rows.tolist()]
        own = torch.tensor([places[number][self.shards[number].image(key)] for number, key in at])
        count = torch.tensor([len(pools[number]) for number, _ in at])
        shown, matched = mismatch(own, count, probability=self.wrong, draws=draws)
        return [pools[number][place] for (number, _), place in zip(at, shown.tolist(), strict=True)], matched

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
