"""The squared distance between embeddings or hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.regularizers.base import Weighted, sides


@dataclass(frozen=True)
class SquaredDistance(Weighted):
    """‖perturbed − clean‖² over the last axis, averaged over rows (FARE); its gradient flows into both.

    Of a regression's scores, `(B,)` or `(B, 1)`, this is their squared difference (SMART). Computed in fp32 (fp64 for
    fp64). `mask` keeps the rows that count, where logits are compared.

    Arguments:
        weight: factor of the penalty.
        reads, reference, on: as `Regularizer` says.
        axis: of the features, if it is not the last.

    Raises:
        ConfigurationError: a weight that is not above 0.
    """

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        clean, perturbed = sides(clean, perturbed, mask, "embeddings", axis=self.axis)
        wide = torch.promote_types(torch.promote_types(clean.dtype, perturbed.dtype), torch.float32)
        difference = perturbed.to(wide) - clean.to(wide)
        if mask is None:
            return self.weight * difference.square().sum() / max(math.prod(difference.shape[:-1]), 1)
        counts = mask.bool()
        difference = torch.where(counts.unsqueeze(-1), difference, 0.0)
        return self.weight * difference.square().sum() / counts.sum().clamp(min=1)
