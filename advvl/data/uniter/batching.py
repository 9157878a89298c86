"""Texts and images as padded tensors, and the batches joined from their rows, with UNITER's field names.

In a sequence a text's tokens come first and its image's regions right after them, padding last; see
`advvl.models.uniter.layout.gather_index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.data.uniter.regions import Regions
from advvl.errors import DataError
from advvl.models.uniter.layout import gather_index


@dataclass(frozen=True)
class Texts:
    """All texts of a source: `ids` (N, L) long, zero padded; `lengths` (N,)."""

    ids: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Images:
    """All images of a source: `features` (M, R, F), `boxes` (M, R, 7), zero padded; `lengths` (M,);
    `labels` (M, R, C), the distribution over classes of each region, column 0 for the background.
    """

    features: Tensor
    boxes: Tensor
    lengths: Tensor
    labels: Tensor


def pad_texts(rows: Sequence[Sequence[int]]) -> Texts:
    """Pad token ids with 0."""
    ids = [torch.tensor(row) for row in rows]
    return Texts(pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in rows]))


def pad_images(rows: Sequence[Regions]) -> Images:
    """Pad the regions of images with 0; without `labels` where an image has none.

    Raises:
        DataError: images of different numbers of features.
    """
    if len({image.features.shape[1] for image in rows}) > 1:
        found = sorted({image.features.shape[1] for image in rows})
        raise DataError(f"expected as many features of each region, got {found}; take images of one extraction")
    labels = [image.labels for image in rows if image.labels is not None]
    whole = len(labels) == len(rows)
    return Images(
        pad_sequence([image.features for image in rows], batch_first=True),
        pad_sequence([image.boxes for image in rows], batch_first=True),
        torch.tensor([len(image) for image in rows]),
        pad_sequence(labels, batch_first=True) if whole else torch.zeros(len(rows), 0, 0),
    )


def collate(texts: Sequence[Sequence[int]], images: Sequence[Regions]) -> dict[str, Tensor]:
    """Collate the ids of texts, special tokens included, with an image each."""
    return joined(pad_texts(texts), pad_images(images))


def join(texts: Texts, text_rows: Tensor, images: Images, image_rows: Tensor) -> dict[str, Tensor]:
    """Join texts and images by their rows (B,) into a batch, cut to the longest text and the most regions among them."""
    longest, most = int(texts.lengths[text_rows].max()), int(images.lengths[image_rows].max())
    return joined(
        Texts(texts.ids[text_rows, :longest], texts.lengths[text_rows]),
        Images(
            images.features[image_rows, :most],
            images.boxes[image_rows, :most],
            images.lengths[image_rows],
            images.labels[image_rows, :most],
        ),
    )


def joined(texts: Texts, images: Images) -> dict[str, Tensor]:
    """Join texts and images, row by row, into a batch; a single one of either belongs to all of the other."""
    rows = max(len(texts.lengths), len(images.lengths))
    txt_lens, num_bbs = texts.lengths.expand(rows), images.lengths.expand(rows)
    longest = texts.ids.shape[1]
    index = gather_index(txt_lens, num_bbs, longest)
    return {
        "input_ids": texts.ids,
        "position_ids": torch.arange(longest)[None],
        "img_feat": images.features,
        "img_pos_feat": images.boxes,
        "attn_masks": (torch.arange(index.shape[1]) < (txt_lens + num_bbs)[:, None]).long(),
        "gather_index": index,
        "txt_lens": txt_lens,
        "num_bbs": num_bbs,
    }


def hide_regions(batch: dict[str, Tensor], img_masks: Tensor) -> dict[str, Tensor]:
    """Return the batch with its masked regions' features zeroed, and the masks over regions and over the sequence."""
    rows, regions = img_masks.nonzero(as_tuple=True)
    in_sequence = torch.zeros_like(batch["gather_index"], dtype=torch.bool)
    in_sequence[rows, batch["txt_lens"][rows] + regions] = True
    hidden = batch["img_feat"].masked_fill(img_masks[..., None], 0.0)
    return {**batch, "img_feat": hidden, "img_masks": img_masks, "img_mask_tgt": in_sequence}
