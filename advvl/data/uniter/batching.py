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


def join(texts: Texts, text_rows: Tensor, images: Images, image_rows: Tensor) -> dict[str, Tensor]:
    """Join texts and images by their rows (B,) into a batch, cut to the longest text and the most regions among them."""
    txt_lens, num_bbs = texts.lengths[text_rows], images.lengths[image_rows]
    longest, most = int(txt_lens.max()), int(num_bbs.max())
    index = gather_index(txt_lens, num_bbs, longest)
    return {
        "input_ids": texts.ids[text_rows, :longest],
        "position_ids": torch.arange(longest)[None],
        "img_feat": images.features[image_rows, :most],
        "img_pos_feat": images.boxes[image_rows, :most],
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
