"""The objectives that an attack on an answerer climbs, and the score that it tries to take away: one number per row.

Legend: B rows, A answers. Targets are VQA's soft scores in [0, 1]; an answer is right if its score is above 0. A row
with no right answer scores 0 whatever is answered, so there is nothing to attack: its objectives are exactly 0, and so
are their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from advvl.errors import DataError, ShapeError

Objective = Callable[[Tensor, Tensor], Tensor]


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """The target score `(B,)` of the answer of the largest logit, the first of equals. Source: VQA's evaluation."""
    _check(logits, targets)
    return targets.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy `(B,)` against the targets, normalised to sum to 1; 0 for a row with no right answer."""
    _check(logits, targets)
    total = targets.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, targets / torch.where(total > 0, total, 1), 0)
    return -(shares.to(logits.dtype) * logits.log_softmax(dim=1)).sum(dim=1)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The largest wrong logit minus the largest right one, `(B,)`; 0 where no answer is right, or none is wrong.

    Unlike cross-entropy its gradient does not vanish where the model is sure. Source: the loss f6 of Carlini & Wagner,
    IEEE S&P 2017, on logits, without its floor.
    """
    _check(logits, targets)
    right = targets > 0
    gap = logits.masked_fill(right, -math.inf).amax(dim=1) - logits.masked_fill(~right, -math.inf).amax(dim=1)
    return torch.where(right.any(dim=1) & (~right).any(dim=1), gap, 0)


OBJECTIVES: Final[Mapping[str, Objective]] = {"cross-entropy": cross_entropy, "margin": margin}


def as_scores(targets: Tensor, logits: Tensor) -> Tensor:
    """Return soft scores `(B, A)`: of class ids `(B,)`, whole numbers, 1 for that class and 0 for any other.

    Raises:
        DataError: an id that is no class of the logits `(B, A)`.
    """
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return targets
    classes = logits.shape[-1]
    if not ((targets >= 0) & (targets < classes)).all():
        wrong = sorted(set(targets[(targets < 0) | (targets >= classes)].tolist()))
        raise DataError(
            f"expected targets as class ids in 0..{classes - 1}, got {wrong[:10]}; leave other examples out"
        )
    return one_hot(targets.long(), classes).to(torch.promote_types(logits.dtype, torch.float32))


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ShapeError(
            f"expected logits and targets of one shape (B, A), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
