"""LXMERT's batches: masks of real positions, and the layout of rows in NLVR2's, with two images per sentence.

An NLVR2 batch holds `visual_feats (B, 2, R, F)`; LXMERT runs on 2B rows, a sentence with its first image and then with its
second, then the next sentence (published code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

IMAGES: Final = 2  # of an example of NLVR2


def twice(x: Tensor) -> Tensor:
    """Each row of an NLVR2 batch once for each of its images, `(2B, …)`: the first row's copies, then the second's."""
    return x.repeat_interleave(IMAGES, 0)


def text_mask(batch: Mapping[str, Any]) -> Tensor:
    """The real tokens, `(B, T)`, or `(2B, T)` of an NLVR2 batch; all where `attention_mask` is absent."""
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return twice(mask) if _of_pairs(batch) else mask


def region_mask(batch: Mapping[str, Any]) -> Tensor:
    """The real regions, `(B, R)`, or `(2B, R)` of an NLVR2 batch; all where `visual_attention_mask` is absent."""
    mask, feats = batch.get("visual_attention_mask"), batch["visual_feats"]
    mask = torch.ones(feats.shape[:-1], dtype=torch.bool, device=feats.device) if mask is None else mask.bool()
    return mask.flatten(0, 1) if _of_pairs(batch) else mask


def examples(batch: Mapping[str, Any]) -> Tensor:
    """The example of each row that LXMERT runs on, `(B,)`, or `(2B,)` of an NLVR2 batch."""
    rows = torch.arange(len(batch["visual_feats"]), device=batch["visual_feats"].device)
    return twice(rows) if _of_pairs(batch) else rows


def _of_pairs(batch: Mapping[str, Any]) -> bool:
    """True if each sentence has two images, `visual_feats (B, 2, R, F)`."""
    return bool(batch["visual_feats"].ndim == 4)
