"""Losses that several tasks share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.errors import DataError, ShapeError


def vqa_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of soft targets summed over the answers, `(B,)`: its mean is the published loss.

    Arguments:
        logits, targets: `(B, A)`; targets in [0, 1].

    Raises:
        ShapeError, DataError: targets of another shape, or of whole numbers.
    """
    _check(logits, targets)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(logits.to(wide), targets.to(wide), reduction="none").sum(1)


def _check(logits: Tensor, targets: Tensor) -> None:
    if targets.shape != logits.shape:
        raise ShapeError(f"expected targets of shape (B, A) = {tuple(logits.shape)}, got {tuple(targets.shape)}")
    if not targets.is_floating_point():
        raise DataError(f"expected targets to be soft scores in floating point, got {targets.dtype}")
