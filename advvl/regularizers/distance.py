"""Distances and similarities of embeddings or hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.regularizers.base import Weighted, mean_of, sides, widened


@dataclass(frozen=True)
class SquaredDistance(Weighted):
    """‖perturbed − clean‖² over the last axis, averaged over rows (FARE); its gradient flows into both.

    For the scores of a regression, `(B,)` or `(B, 1)`, this is their squared difference (SMART). Computed in fp32 (fp64
    for fp64). `mask` keeps the rows that count.

    Arguments:
        weight: factor of the penalty.
        reads, reference, on, rows: as `Regularizer` says.
        axis: the axis of the features, if it is not the last.

    Raises:
        ConfigurationError: a weight that is not above 0.
    """

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = widened(*sides(clean, perturbed, mask, "embeddings", axis=self.axis), mask)
        return self.weight * mean_of((perturbed - clean).square().sum(-1), mask)


@dataclass(frozen=True)
class Distance(Weighted):
    """‖perturbed − clean‖ over the last axis, averaged over rows (circuit breakers); at equality its gradient is zero.

    Arguments and errors as `SquaredDistance`.
    """

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = widened(*sides(clean, perturbed, mask, "embeddings", axis=self.axis), mask)
        return self.weight * mean_of(torch.linalg.vector_norm(perturbed - clean, dim=-1), mask)


@dataclass(frozen=True)
class Alignment(Weighted):
    """max(0, cos(clean, perturbed)) over the last axis, averaged over rows (circuit breakers): zero at a right angle.

    Unlike a distance it is largest at equality, so it drives a pass away from its reference.

    Arguments and errors as `SquaredDistance`.
    """

    @property
    def vanishes_at_equality(self) -> bool:
        return False

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = widened(*sides(clean, perturbed, mask, "embeddings", axis=self.axis), mask)
        return self.weight * mean_of(F.cosine_similarity(clean, perturbed, dim=-1).relu(), mask)
