"""Referring expressions: which region of an image does a text refer to?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import flag, is_number, is_whole, shown, text
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import collate
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import word_pieces
from advvl.errors import DataError

DRAWN: Final = "visual_grounding_coco_gt_{:012}.npz"
"""The names of images in the published database of human-drawn boxes, by the images' numbers."""

DETECTED: Final = "visual_grounding_det_coco_{:012}.npz"
"""The names of images in the published databases of detected regions."""


@dataclass(frozen=True, eq=False)
class ReferringSource:
    """Referring expressions for `advvl.tasks.uniter.referring.UniterForReferring`.

    Arguments:
        shards: databases of expressions and of images, with human-drawn boxes in the order of `images.json`, or with
            detected regions.
        names: of images in these, by their number: `DRAWN` or `DETECTED`.
        targets: include the region referred to; only with human-drawn boxes.
        boxes: include the boxes, to score regions by their overlap with the right one.
        skip_bad: read every example once, and leave out and list those that cannot be used.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
    """

    shards: Sequence[Shard]
    names: str = DRAWN
    targets: bool = True
    boxes: bool = False
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        text(self, "names")
        flag(self, "targets", "boxes", "skip_bad")
        object.__setattr__(self, "_images", [_by_id(shard) for shard in self.shards])
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The expressions at `indices`.

        Returns:
            UNITER's fields, `obj_masks` (B, R) bool, True at padded regions, and as requested `targets` (B, 1) long,
            the region referred to; `region_boxes` (B, R, 4) and `target_boxes` (B, 4), x, y, width, height in pixels.
        """
        del generator
        items = self.examples.made(checked_rows(indices, len(self)).tolist(), self._item)
        fields: dict[str, Any] = collate([item[0] for item in items], [item[1] for item in items])
        fields["obj_masks"] = torch.arange(fields["img_feat"].shape[1]) >= fields["num_bbs"][:, None]
        if self.targets:
            fields["targets"] = torch.tensor([[item[2]] for item in items])
        if self.boxes:
            fields["region_boxes"] = pad_sequence([item[3] for item in items], batch_first=True)
            fields["target_boxes"] = torch.stack([item[4] for item in items])
        return fields

    def _length(self, number: int, key: str) -> int:
        shard = self.shards[number]
        return shard.texts.lengths[key] + 2 + shard.regions(self._name(shard.texts[key]))

    def _name(self, record: Mapping[str, Any]) -> str:
        found = record.get("image_id")
        if not is_whole(found):
            raise DataError(f"image_id: expected an image's number, got {shown(found)}; correct it")
        return self.names.format(found)

    def _item(self, number: int, key: str) -> tuple[list[int], Regions, int, Tensor, Tensor]:
        shard = self.shards[number]
        record = shard.texts[key]
        regions = shard.images.read(self._name(record))
        image = self._images[number].get(record["image_id"])  # type: ignore[attr-defined]
        if image is None:
            raise DataError(
                f"image_id: expected an image of images.json, got {record['image_id']}; is it another split's?"
            )
        target = -1
        if self.targets:
            if len(image["ann_ids"]) != len(regions):
                raise DataError(
                    f"expected regions of the {len(image['ann_ids'])} boxes of image {record['image_id']}, got "
                    f"{len(regions)}; give targets=False of detected ones"
                )
            if record.get("ann_id") not in image["ann_ids"]:
                raise DataError(f"ann_id: expected a box of the image, got {shown(record.get('ann_id'))}; correct it")
            target = image["ann_ids"].index(record["ann_id"])
        size = torch.tensor([image["width"], image["height"]] * 2)
        return (
            shard.within_text(word_pieces(record)),
            regions,
            target,
            regions.boxes[:, [0, 1, 4, 5]] * size,
            _box(record) if self.boxes else torch.zeros(4),
        )


def _by_id(shard: Shard) -> dict[int, Mapping[str, Any]]:
    """The images of `images.json` by their number."""
    found: dict[int, Mapping[str, Any]] = {}
    for place, image in enumerate(shard.texts.table("images")):
        numbers = [image.get(name) for name in ("id", "width", "height")] if isinstance(image, dict) else []
        if not numbers or not all(map(is_whole, numbers)) or not isinstance(image.get("ann_ids"), list):
            raise DataError(
                f"{shard.texts.folder}/images.json, entry {place}: expected id, width, height and ann_ids, got "
                f"{shown(image)}; write it again"
            )
        found[image["id"]] = image
    return found


def _box(record: Mapping[str, Any]) -> Tensor:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise DataError(f"bbox: expected x, y, width and height in pixels, got {shown(box)}; correct it")
    return torch.tensor(box, dtype=torch.float32)
