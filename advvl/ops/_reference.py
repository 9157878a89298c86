"""The definition of every op, in plain PyTorch: correct at zero, at infinity and for an empty batch; not fast.

How a result stays inside its ball. Entries are computed in fp32 (fp64 for fp64) and squares are summed in fp64, so a
computed norm is off by less than s units in the last place (ulp): 1.5, or in fp64, where the sum itself rounds, 16 and,
packed, a quarter of the rows. A row is rescaled when its computed norm, or that of what would be stored, exceeds
`radius * (1 - s ulp)`: to `radius * (1 - (3 s + 0.5) ulp)` less half an ulp of the storage dtype and half a subnormal an
entry. Division, product and cast add less than that back. So the stored row is inside, and a second projection finds it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from advvl.ops._types import Move, Norm, Region, Rows, Stepped


class _Reduction:
    """Reduces a perturbation over its rows, and spreads one value per row over it."""

    def __init__(self, like: Tensor, rows: Rows) -> None:
        self.per, self.segments, self.ndim = rows.per, rows.segments, like.ndim
        count = like.shape[-1] if self.per == "token" else math.prod(like.shape[1:])
        self.size = count * (like.shape[0] if self.segments is not None and self.per == "sample" else 1)
        self.unit = None if rows.unit is None else rows.unit.to(torch.float64)

    def amax(self, values: Tensor) -> Tensor:
        return self._reduce(values, lambda t, dim: t.amax(dim), "amax")

    def sum(self, values: Tensor) -> Tensor:
        """Summed in fp64."""
        return self._reduce(values, lambda t, dim: t.sum(dim, dtype=torch.float64), "sum")

    def _reduce(self, values: Tensor, reduce: Callable[[Tensor, int], Tensor], name: str) -> Tensor:
        if self.per == "token":
            return reduce(values, -1)
        flat = values.flatten(1)
        rows = reduce(flat, 1)
        if self.segments is None:
            return rows
        return torch.zeros_like(rows).scatter_reduce(0, self.segments, rows, name, include_self=True)

    def spread(self, rows: Tensor) -> Tensor:
        if self.per == "token":
            return rows.unsqueeze(-1)
        if self.segments is not None:
            rows = rows[self.segments]
        return rows.reshape(-1, *[1] * (self.ndim - 1))

    def scaled(self, number: float) -> float | Tensor:
        """A step size or radius in the unit of every row; without a unit, the number itself."""
        return number if self.unit is None or math.isinf(number) else number * self.unit

    def empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[:-1] if self.per == "token" else like.shape[:1])


def refusal(delta: Tensor, rows: Rows) -> str | None:
    del delta, rows
    return None


def move(moves: Sequence[Move], *, inplace: bool) -> list[Stepped]:
    stepped = [_move(one) for one in moves]
    if inplace:
        return [made._replace(delta=one.delta.copy_(made.delta)) for one, made in zip(moves, stepped, strict=True)]
    return stepped


def _move(one: Move) -> Stepped:
    delta, rows, norm, floor = one.delta, one.rows, one.rows.norm, one.floor
    over = _Reduction(delta, rows)
    d, g = _masked(_compute(delta), rows.mask), _masked(_compute(one.grad), rows.mask)
    if d.numel() == 0:
        zero = over.empty(d)
        return Stepped(delta.clone(), zero, zero, torch.ones_like(zero, dtype=torch.bool))
    biggest = over.amax(g.abs())
    finite = biggest.isfinite()
    moves = finite & (biggest > 0)
    unity = torch.ones_like(biggest)
    unit = g / over.spread(torch.where(moves, biggest, unity))  # entries of at most 1: no overflow, no underflow
    length = over.sum(unit.square()).sqrt().to(d.dtype) if norm == "l2" else unity
    step = over.scaled(one.step_size)
    if one.rule == "sign":
        direction = g.sign()
    elif one.rule == "plain":
        direction = g
        longest = biggest.double() * length * over.scaled(abs(one.step_size))
        moves = moves & (longest < torch.finfo(d.dtype).max / 4)
    else:
        # biggest * length is the norm; one over max(norm, floor), without forming a norm that may underflow
        inverse = torch.minimum(1 / torch.where(moves, length, unity), biggest / floor if floor else unity * math.inf)
        direction = unit * over.spread(inverse)
    step = over.spread(step) if isinstance(step, Tensor) else step
    d = d + (step * torch.where(over.spread(moves), direction, torch.zeros_like(direction))).to(d.dtype)
    d = _into(d, one.region, norm, over, rows.mask, delta.dtype)
    return Stepped(d, torch.where(biggest > 0, biggest * length, biggest), _norm(_compute(d), norm, over), finite)


def project(delta: Tensor, rows: Rows, region: Region) -> Tensor:
    if delta.numel() == 0:
        return delta.clone()
    d = _masked(_compute(delta), rows.mask)
    return _into(d, region, rows.norm, _Reduction(delta, rows), rows.mask, delta.dtype)


def norms(delta: Tensor, rows: Rows) -> Tensor:
    over = _Reduction(delta, rows)
    d = _masked(_compute(delta), rows.mask)
    return _norm(d, rows.norm, over) if d.numel() else over.empty(d)


def _compute(values: Tensor) -> Tensor:
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim)), values, torch.zeros_like(values))


def _norm(d: Tensor, norm: Norm, over: _Reduction) -> Tensor:
    return over.amax(d.abs()) if norm == "linf" else _l2(d, over).to(d.dtype)


def _l2(d: Tensor, over: _Reduction) -> Tensor:
    """The norm of every row, in fp64."""
    biggest = over.amax(d.abs())
    unit = d / over.spread(torch.where(biggest > 0, biggest, torch.ones_like(biggest)))
    return biggest * over.sum(unit.square()).sqrt()


def _into(d: Tensor, region: Region, norm: Norm, over: _Reduction, mask: Tensor | None, storage: torch.dtype) -> Tensor:
    """The perturbation inside ball and box, in its storage dtype."""
    radius, box, x = over.scaled(region.radius), region.box, region.x
    if math.isfinite(region.radius):
        if norm == "l2":
            d = _rescaled(d, radius, over, storage)
        elif isinstance(radius, Tensor):
            widths = over.spread(_not_above(radius, storage))
            d = d.clamp(-widths, widths)
        else:
            bound = not_above(radius, storage)
            d = d.clamp(-bound, bound)
    d = d.to(storage)
    return _masked(boxed(d, x, box), mask) if box is not None and x is not None else d


def boxed(d: Tensor, x: Tensor, box: tuple[float, float]) -> Tensor:
    """The perturbation with `x + d` in the box, as far as no entry grows."""
    # Only entries outside the box change, and towards zero: (x + d) - x would round d out of its ball. Where x itself
    # is outside, the way in may be longer than d: it gets the length of d, and the ball takes precedence.
    low, high = box
    wide = _compute(x)
    moved = wide + _compute(d)
    down = torch.minimum(d, torch.maximum((high - wide).to(d.dtype), -d.abs()))
    up = torch.maximum(d, torch.minimum((low - wide).to(d.dtype), d.abs()))
    return torch.where(moved > high, down, torch.where(moved < low, up, d))


def _rescaled(d: Tensor, radius: float | Tensor, over: _Reduction, storage: torch.dtype) -> Tensor:
    packed = 0 if over.segments is None else d.shape[0]
    limit, target = bounds(radius, over.size, d.dtype, storage, packed=packed)
    length = _l2(d, over)
    outside = length > limit
    if storage != d.dtype:  # rounded to storage, a row may grow out of its ball
        outside |= _l2(_compute(d.to(storage)), over) > limit
    # A tensor over a tensor: a number over one is its product with a reciprocal, which a tiny length overflows.
    targets = target if isinstance(target, Tensor) else torch.full_like(length, target)
    scale = torch.where(outside, targets / length, torch.ones_like(length))
    return (d * over.spread(scale)).to(d.dtype)


@overload
def bounds(
    radius: float, size: int, wide: torch.dtype, storage: torch.dtype, *, packed: int = 0
) -> tuple[float, float]: ...


@overload
def bounds(
    radius: Tensor, size: int, wide: torch.dtype, storage: torch.dtype, *, packed: int = 0
) -> tuple[Tensor, Tensor]: ...


def bounds(
    radius: float | Tensor, size: int, wide: torch.dtype, storage: torch.dtype, *, packed: int = 0
) -> tuple[float | Tensor, float | Tensor]:
    """The computed norm above which a row is rescaled, and the norm after rescaling; see the module's docstring."""
    ulp, stored = torch.finfo(wide).eps, torch.finfo(storage)
    slack = ulp * (16 + packed / 4 if wide == torch.float64 else 1.5)  # packed rows are summed one after another
    subnormal = stored.smallest_normal * stored.eps
    rounded = subnormal if wide == torch.float64 else 0.0  # of a norm: it is kept in fp64, where no fp32 is subnormal
    target = radius * (1 - 3 * slack - 0.5 * ulp - 0.5 * stored.eps) - 0.5 * subnormal * math.sqrt(size) - 2 * rounded
    limit = radius * (1 - slack) - rounded
    if isinstance(target, Tensor) and isinstance(limit, Tensor):
        return limit.clamp(min=0.0), target.clamp(min=0.0)
    return max(limit, 0.0), max(target, 0.0)


def not_above(radius: float, storage: torch.dtype) -> float:
    """The largest number of the storage dtype that does not exceed the radius."""
    return float(_not_above(torch.tensor(radius, dtype=torch.float64), storage))


def _not_above(radius: Tensor, storage: torch.dtype) -> Tensor:
    nearest = radius.to(storage)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[nearest.element_size()]
    return torch.where(nearest > radius, (nearest.view(bits) - 1).view(storage), nearest)
