"""The optimal-transport distance between two sets of vectors, by IPOT (Xie et al., UAI 2019, arXiv:1802.04307)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.errors import ShapeError


def transport_distance(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor,
    y_mask: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """The least mean cosine distance at which the vectors of each `x` can be moved onto those of `y`: `(B,)`.

    Each vector of a set has the same mass; the distance from or to an empty set is 0. Gradients flow through the costs,
    not through the plan, as published (Chen et al., ECCV 2020, word-region alignment). Computed in float32 at least.

    Arguments:
        x, y: `(B, M, H)` and `(B, N, H)`.
        x_mask, y_mask: the real vectors, `(B, M)` and `(B, N)` bool.
        beta: strength of the proximal term; it affects the speed of convergence, not the limit.
        iterations: of the plan; the published 50 end within 4e-3 of the optimum on random clouds of up to 36 vectors,
            200 within 1e-3.

    Raises:
        ShapeError: masks of another shape.
    """
    if x.shape[:2] != x_mask.shape or y.shape[:2] != y_mask.shape:
        raise ShapeError(
            f"expected masks of shape {tuple(x.shape[:2])} and {tuple(y.shape[:2])}, got {tuple(x_mask.shape)} "
            f"and {tuple(y_mask.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        costs = cosine_costs(x.to(wide), y.to(wide))
        return (costs * transport_plan(costs, x_mask, y_mask, beta=beta, iterations=iterations)).sum((1, 2))


def cosine_costs(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of every pair, `(B, M, N)`."""
    return 1.0 - F.normalize(x, dim=-1, eps=1e-5) @ F.normalize(y, dim=-1, eps=1e-5).transpose(1, 2)


@torch.no_grad()
def transport_plan(costs: Tensor, x_mask: Tensor, y_mask: Tensor, *, beta: float, iterations: int) -> Tensor:
    """The share of each x that goes to each y, `(B, M, N)`: rows sum to 1/m, columns to 1/n over m and n real vectors.

    Nothing goes from or to an empty set.
    """
    both = (x_mask.any(1) & y_mask.any(1))[:, None]
    x_mask, y_mask = x_mask & both, y_mask & both
    plan = (x_mask[:, :, None] & y_mask[:, None]).to(costs.dtype)
    x_real, y_real = x_mask.to(costs.dtype)[:, :, None], y_mask.to(costs.dtype)[:, None]
    m, n = x_real.sum(1, keepdim=True).clamp(min=1), y_real.sum(2, keepdim=True).clamp(min=1)
    kernel, rows = torch.exp(-costs / beta), x_real / m
    for _ in range(iterations):
        proximal = kernel * plan
        columns = 1.0 / (n * (rows * proximal).sum(1, keepdim=True) + (1.0 - y_real))  # of padding: anything finite
        rows = 1.0 / (m * (proximal * columns).sum(2, keepdim=True) + (1.0 - x_real))
        plan = rows * proximal * columns
    return plan
