"""UNITER's sequence layout: a row's tokens come first, its regions right after them, padding last.

The model embeds padded text (B, L) and padded regions (B, R) separately, joins them to (B, L + R), and then selects by
`gather_index` (B, S) the embedding at each position, where S is the number of tokens and regions of the longest row
(Chen et al., ECCV 2020, published code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from advvl.errors import DataError, ShapeError


def gather_index(txt_lens: Tensor, num_bbs: Tensor, max_txt_len: int) -> Tensor:
    """The index into `[text, regions]`, joined, of the embedding at each position of the sequences: `(B, S)`.

    Positions past a row's end hold arbitrary valid indices; the attention mask hides them.

    Arguments:
        txt_lens, num_bbs: tokens and regions of each row, `(B,)`.
        max_txt_len: L, the width that the text is padded to.

    Raises:
        ShapeError: lengths that are not two equally long vectors.
        DataError: a text longer than `max_txt_len`.
    """
    if txt_lens.ndim != 1 or txt_lens.shape != num_bbs.shape:
        raise ShapeError(
            f"expected txt_lens and num_bbs of one shape (B,), got {tuple(txt_lens.shape)} and {tuple(num_bbs.shape)}"
        )
    if txt_lens.numel() == 0:
        return torch.zeros(0, 0, dtype=torch.long, device=txt_lens.device)
    if int(txt_lens.max()) > max_txt_len:
        raise DataError(f"expected texts of at most max_txt_len = {max_txt_len} tokens, got {int(txt_lens.max())}")
    ends = txt_lens + num_bbs
    place = torch.arange(int(ends.max()), device=txt_lens.device)[None]
    region = (place >= txt_lens[:, None]) & (place < ends[:, None])
    return torch.where(region, place - txt_lens[:, None] + max_txt_len, place)


def text_mask(batch: Mapping[str, Any]) -> Tensor:
    """The real tokens of a batch, `(B, L)` bool: all but padding."""
    width = batch["input_ids"].shape[1]
    if batch.get("txt_lens") is not None:
        return _first(batch["txt_lens"], width)
    return _attended(batch)[:, :width]


def region_mask(batch: Mapping[str, Any]) -> Tensor:
    """The real regions of a batch, `(B, R)` bool: all but padding."""
    width = batch["img_feat"].shape[1]
    if batch.get("num_bbs") is not None:
        return _first(batch["num_bbs"], width)
    return _attended(batch)[:, batch["input_ids"].shape[1] :]


def _first(lengths: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _attended(batch: Mapping[str, Any]) -> Tensor:
    """The embeddings, of `L + R`, used at some attended position, `(B, L + R)` bool; computed on the device."""
    index: Tensor = batch["gather_index"]
    width = batch["input_ids"].shape[1] + batch["img_feat"].shape[1]
    attended: Tensor = batch["attn_masks"]
    if index.shape != attended.shape:
        raise ShapeError(
            f"expected gather_index and attn_masks of one shape (B, S), got {tuple(index.shape)} and "
            f"{tuple(attended.shape)}"
        )
    holds = index[..., None] == torch.arange(width, device=index.device)
    return (holds & attended.bool()[..., None]).any(1)
