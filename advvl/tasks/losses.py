"""Losses that several tasks share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.errors import DataError, ShapeError
from advvl.runtime.reading import readable


def vqa_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of soft targets summed over the answers, `(B,)`: its mean is the published loss.

    Arguments:
        logits, targets: `(B, A)`; targets in [0, 1].

    Raises:
        ShapeError, DataError: targets of another shape, or of whole numbers.
    """
    return answer_losses(logits, targets).sum(1)


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each answer's soft target, `(B, A)`.

    Arguments:
        logits, targets: `(B, A)`; targets in [0, 1].

    Raises:
        ShapeError, DataError: targets of another shape, or of whole numbers.
    """
    _check(logits, targets)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(logits.to(wide), targets.to(wide), reduction="none")


def class_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of one class per row, `(B,)`: its mean is the published loss.

    Arguments:
        logits: `(B, C)`.
        targets: whole numbers in 0 … C − 1, `(B,)` or `(B, 1)`.

    Raises:
        ShapeError, DataError: targets of another shape, of other numbers, or, on a CPU, that are no class.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), class_targets(logits, targets), reduction="none")


def class_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """The class of each row, `(B,)` long, of targets `(B,)` or `(B, 1)`.

    Raises:
        ShapeError, DataError: as `class_losses`.
    """
    rows, classes = logits.shape
    if targets.shape not in ((rows,), (rows, 1)):
        raise ShapeError(
            f"expected targets of shape (B,) = {(rows,)}, or (B, 1), got {tuple(targets.shape)}; give one for each row of "
            "logits"
        )
    if targets.is_floating_point():
        raise DataError(f"expected targets of whole numbers, got {targets.dtype}; give classes, not scores")
    targets = targets.reshape(rows).long()
    if readable(targets) and ((targets < 0) | (targets >= classes)).any():
        wrong = sorted(set(targets[(targets < 0) | (targets >= classes)].tolist()))
        raise DataError(f"expected targets in 0..{classes - 1}, got {wrong[:10]}; leave rows without one out")
    return targets


def _check(logits: Tensor, targets: Tensor) -> None:
    if targets.shape != logits.shape:
        raise ShapeError(f"expected targets of shape (B, A) = {tuple(logits.shape)}, got {tuple(targets.shape)}")
    if not targets.is_floating_point():
        raise DataError(f"expected targets to be soft scores in floating point, got {targets.dtype}")
