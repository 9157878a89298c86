"""The CPU back end: blocks of whole rows, each taken from memory once and finished while it is in the cache.

A block is `(rows, chunks, entries)` and a problem of its own. One that is out of the ordinary (gradients that are not
finite, or of a size that fp32 cannot step along) goes to the definition as it is, and so does every block in fp64.

How a result stays inside its ball. Where fp32 squares neither overflow nor drown, they are summed by fours in fp32 and the
fours in fp64: four roundings at most, so the norm is off by no more than one unit in the last place (ulp). Elsewhere all of
it is fp64. The factor rounded to fp32 and its product add an ulp, of the 4.5 that `_reference.bounds` has for them.
Norms that are only reported, or divided by, are summed in fp32 within a short chunk: a few ulp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advvl.ops import _reference
from advvl.ops._types import Move, Region, Rows, Stepped

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BYTES = 1 << 23  # of delta and gradient: they stay in the cache that the threads share, and calls are few
_CHUNK = 256  # the most entries whose squares are summed in fp32
_MANY = 1 << 15  # entries of a block, from which on fp64 costs more than the calls that avoid it


def refusal(delta: Tensor, rows: Rows) -> str | None:
    if not delta.is_cpu:
        return f"it is on {delta.device}, not in the memory of the CPU"
    if delta.dtype not in _DTYPES:
        return f"it is of {delta.dtype}, not of one of {_DTYPES}"
    if not delta.is_contiguous():
        return "it is not contiguous"
    if rows.segments is not None and rows.per == "sample":
        return "it is packed, and what belongs to a sample may lie anywhere"
    return None


def move(moves: Sequence[Move], *, inplace: bool) -> list[Stepped]:
    return [_move(one, one.delta if inplace else torch.empty_like(one.delta)) for one in moves]


def _move(one: Move, moved: Tensor) -> Stepped:
    if one.delta.numel() == 0:
        return _reference.move([one], inplace=False)[0]._replace(delta=moved)
    sweep = _Sweep(one.delta, one.rows)
    blocks = sweep.blocks(one.delta, one.grad, one.region.x, moved)
    grad_norm, delta_norm, finite = (
        torch.cat(parts).reshape(sweep.rows)
        for parts in zip(*(sweep.move(one, *block) for block in blocks), strict=True)
    )
    wide = [torch.float64 if t.dtype == torch.float64 else torch.float32 for t in (one.grad, moved)]
    return Stepped(moved, grad_norm.to(wide[0]), delta_norm.to(wide[1]), finite)


def project(delta: Tensor, rows: Rows, region: Region) -> Tensor:
    projected = torch.empty_like(delta)
    if delta.numel():
        sweep = _Sweep(delta, rows)
        for d, x, out, hidden in sweep.blocks(delta, region.x, projected):
            sweep.project(d, x, out, hidden, region)
    return projected


def norms(delta: Tensor, rows: Rows) -> Tensor:
    if delta.numel() == 0:
        return _reference.norms(delta, rows)
    sweep = _Sweep(delta, rows)
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    return torch.cat([sweep.norms(*block) for block in sweep.blocks(delta)]).reshape(sweep.rows).to(wide)


class _Hidden(NamedTuple):
    """The masked positions of a block."""

    chunks: Tensor  # (rows, chunks) bool
    rows: Tensor  # (rows,) bool: those with no position left
    bits: Tensor  # (rows, chunks, 1) int32: what entries of fp32 are left, all of their bits or none


class _Lengths(NamedTuple):
    """The norms of a block's rows, in fp64, and their extremes over rows that are not hidden."""

    values: Tensor
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor, hidden: _Hidden | None = None) -> _Lengths:
        low, high = torch.aminmax(values if hidden is None else values.masked_fill(hidden.rows, values.amax()))
        return cls(values, low.item(), high.item())


class _Sweep:
    """A perturbation cut into blocks, what is done to one, and the memory in which it is done."""

    def __init__(self, like: Tensor, rows: Rows) -> None:
        axes = like.ndim - 1 if rows.per == "token" else 1
        self.rows, self.norm = like.shape[:axes], rows.norm
        count = math.prod(self.rows)
        self.size = like.numel() // count
        mask = None if rows.mask is None or bool(rows.mask.all()) else rows.mask
        if mask is not None:
            mask = mask.reshape(*mask.shape, *[1] * (axes - mask.ndim)).expand(*self.rows, *mask.shape[axes:])
            mask = mask.reshape(count, -1)
        entries = self.size if mask is None else self.size // mask.shape[1]
        self.chunk = _chunk(entries)
        self.shape = (count, self.size // self.chunk, self.chunk)
        self.height = max(1, min(count, _BYTES // (8 * self.size)))
        self.hidden = None if mask is None else _hide(mask.repeat_interleave(entries // self.chunk, 1))
        self.least = math.sqrt(self.size) * 1e-15  # squares that drown in fp32 are nothing to a row as long as this
        self.finite = torch.ones(self.height, dtype=torch.bool)
        self.scratch: dict[str, Tensor] = {}

    def blocks(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The same rows of every tensor (None of None), and what of them is hidden."""
        height, count = self.height, self.shape[0]
        nothing = [None] * math.ceil(count / height)
        cut = [nothing if t is None else torch.split(t.reshape(self.shape), height) for t in tensors]
        hidden = nothing if self.hidden is None else map(_Hidden, *(torch.split(t, height) for t in self.hidden))
        return zip(*cut, hidden, strict=True)

    def move(
        self, one: Move, delta: Tensor, grad: Tensor, x: Tensor | None, out: Tensor, hidden: _Hidden | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The norms of the gradient and of what is left in `out`, and whether the gradient is finite."""
        lengths = factors = None
        if torch.float64 not in (delta.dtype, grad.dtype):
            grad = self._single(grad, "gradient")
            lengths = self._measure(grad, hidden)
            factors = _factors(lengths, one)
        if lengths is None or factors is None:
            region = replace(one.region, x=x)
            same = replace(one, delta=delta, grad=grad, rows=self._rows(hidden), region=region)
            made = _reference.move([same], inplace=False)[0]
            out.copy_(made.delta)
            return made.grad_norm, made.delta_norm, made.finite
        delta = self._single(delta, "delta")
        work = out if out.dtype == torch.float32 else delta
        direction = torch.sign(grad, out=self._room(grad, "sign")) if one.rule == "sign" else grad
        torch.addcmul(delta, direction, factors, out=work)
        moved = self._contain(work, x, out, hidden, one.region)
        if moved is None:
            moved = self._measure(work, hidden).values
        return lengths.values, moved, self.finite[: len(moved)]

    def project(self, delta: Tensor, x: Tensor | None, out: Tensor, hidden: _Hidden | None, region: Region) -> None:
        if delta.dtype == torch.float64:
            out.copy_(_reference.project(delta, self._rows(hidden), replace(region, x=x)))
        else:
            work = out if out.dtype == torch.float32 else self._room(delta, "delta")
            self._contain(work.copy_(delta), x, out, hidden, region)

    def norms(self, delta: Tensor, hidden: _Hidden | None) -> Tensor:
        if delta.dtype == torch.float64:
            return _reference.norms(delta, self._rows(hidden))
        return self._measure(self._single(delta, "delta"), hidden).values

    def _rows(self, hidden: _Hidden | None) -> Rows:
        """A block's rows, as the definition knows them."""
        return Rows(norm=self.norm, mask=None if hidden is None else ~hidden.chunks)

    def _contain(
        self, work: Tensor, x: Tensor | None, out: Tensor, hidden: _Hidden | None, region: Region
    ) -> Tensor | None:
        """Into the ball and the box, in the dtype of `out`; `work` ends as what `out` has. Its norms, if they are known."""
        radius, lengths = region.radius, None
        shrinks = self.norm == "l2" and math.isfinite(radius)
        _clear(work, hidden)
        if shrinks:
            lengths, _ = self._shrink(work, radius, out.dtype)
        elif math.isfinite(radius):
            bound = _reference.not_above(radius, out.dtype)
            work.clamp_(-bound, bound)
        if work is not out:
            work.copy_(out.copy_(work))
            if shrinks:  # rounded to storage, a row may have grown out of its ball
                lengths, outside = self._shrink(work, radius, out.dtype)
                if outside:
                    work.copy_(out.copy_(work))
                    lengths = None
        if region.box is not None and x is not None:
            work.copy_(_reference.boxed(out, x, region.box))
            if work is not out:
                out.copy_(work)
            lengths = None
        return lengths

    def _shrink(self, work: Tensor, radius: float, storage: torch.dtype) -> tuple[Tensor | None, bool]:
        """Rescale the rows outside the ball: the norms, where they are known, and whether there were such rows."""
        limit, target = _reference.bounds(radius, self.size, torch.float32, storage)
        length, low, high = self._decide(work, radius)
        if high <= limit:
            return (length if low >= self.least else None), False
        # A tensor over a tensor: a number over one is its product with a reciprocal. A row that is infinite stays so.
        scale = torch.where((length > limit) & length.isfinite(), torch.full_like(length, target) / length, 1.0)
        if target >= high * 1e-30:
            work.mul_(scale.to(work.dtype).view(-1, 1, 1))
        else:  # as a number of fp32, the scale would be short of digits
            torch.mul(work.to(torch.float64), scale.view(-1, 1, 1), out=work)
        return (length * scale if min(low, target) >= self.least else None), True

    def _decide(self, work: Tensor, radius: float) -> _Lengths:
        """The norms that tell whether a row is in its ball; see the module's docstring. Masked positions are zero by now."""
        if radius >= self.least and self.size % 4 == 0 and work.numel() >= _MANY:
            first, *others = work.view(len(work), -1).chunk(4, 1)
            fours = torch.mul(first, first, out=self._room(first, "fours"))
            for other in others:
                fours.addcmul_(other, other)
            wide = self._room(first, "sums", torch.float64).copy_(fours)  # sum(dtype=...) would take new memory for it
            lengths = _Lengths.of(wide.sum(1).sqrt())
            if math.isfinite(lengths.high):
                return lengths
        return _Lengths.of(torch.linalg.vector_norm(work, dim=(1, 2), dtype=torch.float64))

    def _measure(self, values: Tensor, hidden: _Hidden | None) -> _Lengths:
        if self.norm == "linf":
            return _over_chunks(torch.maximum(values.amax(2), -values.amin(2)), hidden, math.inf)
        if self.chunk <= _CHUNK:
            lengths = _over_chunks(torch.linalg.vector_norm(values, dim=2), hidden, 2.0)
            if self.least <= lengths.low and lengths.high <= 1e18:
                return lengths  # no square has overflown, and those that drowned are nothing beside the sum
        return _over_chunks(torch.linalg.vector_norm(values, dim=2, dtype=torch.float64), hidden, 2.0)

    def _single(self, values: Tensor, use: str) -> Tensor:
        return values if values.dtype == torch.float32 else self._room(values, use).copy_(values)

    def _room(self, like: Tensor, use: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a block, the same for every block."""
        if use not in self.scratch:
            self.scratch[use] = torch.empty(like.shape, dtype=dtype)  # the first block: none is larger
        return self.scratch[use][: len(like)]


def _hide(mask: Tensor) -> _Hidden:
    return _Hidden(~mask, ~mask.any(1), mask.to(torch.int32).neg_().unsqueeze(-1))


def _clear(work: Tensor, hidden: _Hidden | None) -> None:
    if hidden is not None:
        work.view(torch.int32).bitwise_and_(
            hidden.bits
        )  # NaN too; to fill where a mask says so takes ten times as long


def _over_chunks(parts: Tensor, hidden: _Hidden | None, order: float) -> _Lengths:
    if hidden is not None:
        parts.masked_fill_(hidden.chunks, 0.0)
    return _Lengths.of(torch.linalg.vector_norm(parts, order, dim=1, dtype=torch.float64), hidden)


def _factors(lengths: _Lengths, one: Move) -> Tensor | None:
    """What the direction of every row is multiplied by, `(rows, 1, 1)`; None where fp32 cannot tell."""
    values, low, high = lengths
    step = abs(one.step_size)
    if not math.isfinite(high):
        return None
    if one.rule == "sign":
        return torch.full((1, 1, 1), one.step_size)
    if one.floor:
        values, low, high = values.clamp(min=one.floor), max(low, one.floor), max(high, one.floor)
    elif low == 0:  # such a row does not move
        values = values.masked_fill(values == 0, math.inf)
        low = values.amin().item()
    if high > step * 1e30 or low < step * 1e-30:
        return None
    return (one.step_size / values).to(torch.float32).view(-1, 1, 1)


@cache
def _chunk(entries: int) -> int:
    """The length of the chunks that so many entries are cut into: all of them where they do not divide well."""
    longest = next(size for size in range(min(entries, _CHUNK), 0, -1) if entries % size == 0)
    return longest if longest >= 32 else entries
