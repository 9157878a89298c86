"""The Jensen-Shannon divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.errors import ShapeError
from advvl.regularizers.base import Weighted, mean_of, sides, widened


@dataclass(frozen=True)
class JensenShannon(Weighted):
    """½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2: a symmetric divergence of at most log 2; its gradient flows into both.

    Computed from logits in log space, in fp32 (fp64 for fp64), summed over classes and averaged over rows.

    Arguments:
        weight: factor of the penalty.
        reads, reference, on, rows: as `Regularizer` says.
        axis: the axis of the classes in the compared tensor; None: the last, of up to three axes.

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991.

    Raises:
        ConfigurationError: a weight that is not above 0.
    """

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        given = tuple(clean.shape)
        clean, perturbed = sides(clean, perturbed, mask, "logits", axis=self.axis)
        if clean.shape[-1:] == (1,):
            raise ShapeError(f"expected two classes or more, got {given}; use SquaredDistance() for regression")
        clean, perturbed = widened(clean, perturbed, mask)
        p, q = clean.log_softmax(-1), perturbed.log_softmax(-1)
        middle = torch.logaddexp(p, q) - math.log(2)
        rows = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
        return self.weight * mean_of(rows, mask)
