"""Regions: the set that a perturbed input of a network may lie in, and the lowest value of a linear function there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.checks import is_number, shown
from advvl.errors import ConfigurationError, DataError
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.places import Place


@dataclass(frozen=True, eq=False)
class Region:
    """The inputs x + δ of B examples, with δ in a ball, zero at masked positions, and x + δ in a box.

    Arguments:
        x: `(B, *S)` fp64.
        lower, upper: of every entry, `(B, *S)`.
        reach: the radius of δ in L2, broadcastable against `x` and 0 at masked positions; None under Linf, where `lower` and
            `upper` say all.
        per: what one L2 norm is taken over.
    """

    x: Tensor
    lower: Tensor
    upper: Tensor
    reach: Tensor | None = None
    per: str = "sample"

    @property
    def size(self) -> Tensor:
        """A bound of the size of every entry, and of all that is summed to reach it."""
        reach = torch.maximum(self.x - self.lower, self.upper - self.x) if self.reach is None else self.reach
        return self.x.abs() + reach

    def lowest(self, rows: Tensor) -> Tensor:
        """Bound from below R sums of the entries, weighted by `rows` `(R, B, *S)`: `(R, B)`; exact but for L2 in a box."""
        by_entry = rows.clamp(min=0) * self.lower + rows.clamp(max=0) * self.upper
        lowest = by_entry.flatten(2).sum(2)
        if self.reach is None:
            return lowest
        # Scaled by the reach, a position's weights measure how far the ball takes the sum along them.
        scaled = rows * self.reach
        drops = scaled.flatten(2) if self.per == "sample" else scaled
        drop = torch.linalg.vector_norm(drops, dim=-1, keepdim=True).flatten(2).sum(2)
        return torch.maximum(lowest, (rows * self.x).flatten(2).sum(2) - drop)

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, Tensor],
        budget: Mapping[str, Ball],
        masks: Mapping[str, Tensor],
        boxes: Mapping[str, tuple[float, float]],
    ) -> dict[str, Region]:
        """Make the region of each input that the budget names; see `bounds.output_bounds`."""
        for kind, given in (("mask", masks), ("box", boxes)):
            if unknown := sorted(set(given) - set(inputs)):
                raise ConfigurationError(f"expected a {kind} of {sorted(inputs)}, got one of {unknown}; name an input")
        return {
            name: _region(name, inputs[name], ball, masks.get(name), boxes.get(name, (-math.inf, math.inf)))
            for name, ball in budget.items()
        }


def _region(name: str, x: Tensor, ball: Ball, mask: Tensor | None, box: tuple[float, float]) -> Region:
    if not isinstance(ball, L2 | Linf) or not math.isfinite(ball.radius):
        raise ConfigurationError(f"expected L2(…) or Linf(…) with a finite radius for {name!r}, got {ball!r}")
    if not x.isfinite().all():
        raise DataError(f"expected finite numbers in {name!r}, got some that are not")
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[: mask.ndim]
    if mask is not None and not fits:
        raise ConfigurationError(
            f"expected a bool mask of the positions of {name!r} {tuple(x.shape)}, got {shown(mask)}"
        )
    if not isinstance(box, tuple | list) or len(box) != 2 or not all(map(is_number, box)):
        raise ConfigurationError(f"expected a box (lower, upper) of numbers for {name!r}, got {shown(box)}")
    if not (x.min() >= box[0] and x.max() <= box[1]):
        raise DataError(f"expected {name!r} inside its box {box}, got {x.min():g} to {x.max():g}")
    place = Place(x, mask)
    real = place.real(x.ndim)
    reach = (torch.ones_like(x) if real is None else real.to(x)) * (ball.radius * ball.unit(place))
    lower, upper = (x - reach).clamp(min=box[0]), (x + reach).clamp(max=box[1])
    return Region(x, lower, upper, reach if isinstance(ball, L2) else None, ball.per)
