"""Distances and similarities of embeddings or hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.regularizers.base import Weighted, sides


@dataclass(frozen=True)
class SquaredDistance(Weighted):
    """‖perturbed − clean‖² over the last axis, averaged over rows (FARE); its gradient flows into both.

    Of a regression's scores, `(B,)` or `(B, 1)`, this is their squared difference (SMART). Computed in fp32 (fp64 for
    fp64). `mask` keeps the rows that count.

    Arguments:
        weight: factor of the penalty.
        reads, reference, on, rows: as `Regularizer` says.
        axis: of the features, if it is not the last.

    Raises:
        ConfigurationError: a weight that is not above 0.
    """

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = _wide(*sides(clean, perturbed, mask, "embeddings", axis=self.axis), mask)
        return self.weight * _mean((perturbed - clean).square().sum(-1), mask)


@dataclass(frozen=True)
class Distance(Weighted):
    """‖perturbed − clean‖ over the last axis, averaged over rows (circuit breakers); at equality its gradient is zero.

    Arguments and errors as `SquaredDistance`.
    """

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = _wide(*sides(clean, perturbed, mask, "embeddings", axis=self.axis), mask)
        return self.weight * _mean(torch.linalg.vector_norm(perturbed - clean, dim=-1), mask)


@dataclass(frozen=True)
class Alignment(Weighted):
    """max(0, cos(clean, perturbed)) over the last axis, averaged over rows (circuit breakers): zero at a right angle.

    Unlike a distance it is largest at equality, so that it drives a pass away from its reference.

    Arguments and errors as `SquaredDistance`.
    """

    @property
    def vanishes_at_equality(self) -> bool:
        return False

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = _wide(*sides(clean, perturbed, mask, "embeddings", axis=self.axis), mask)
        return self.weight * _mean(F.cosine_similarity(clean, perturbed, dim=-1).relu(), mask)


def _wide(clean: Tensor, perturbed: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sides in fp32 at least, and zero in rows that do not count, which may hold anything."""
    wide = torch.promote_types(torch.promote_types(clean.dtype, perturbed.dtype), torch.float32)
    clean, perturbed = clean.to(wide), perturbed.to(wide)
    if mask is None:
        return clean, perturbed
    counts = mask.bool().unsqueeze(-1)
    return torch.where(counts, clean, 0.0), torch.where(counts, perturbed, 0.0)


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the rows that count; 0 of none."""
    return rows.sum() / (max(math.prod(rows.shape), 1) if mask is None else mask.bool().sum().clamp(min=1))
