"""The CPU back end: blocks of whole rows, each read from memory once and finished while it is in the cache.

A block is `(rows, entries)` and is processed independently. An unusual block (gradients that are not finite, or of a
size that fp32 cannot step along) is passed to the definition, and so is every block in fp64. The cost of small tensors
is the number of calls, so there are few, and a tensor of one block is never cut.

How a result stays inside its ball. Squares are summed in fp64; or, of several blocks, where fp32 squares neither
overflow nor drown, by fours in fp32 and the fours in fp64: four roundings at most, so that the norm is off by no more
than one unit in the last place (ulp). The factor rounded to fp32 and its product add another. `_reference.bounds`
leaves 3.5 between the norm that a row is brought to and the one above which it is outside. Norms that are only reported
or used as divisors are summed in fp32 within a short chunk, to a few ulp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from advvl.ops import _reference
from advvl.ops._types import Box, Move, Region, Rows, Stepped

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BYTES = 1 << 23  # of delta and gradient: they fit the cache that the threads share, with few calls
_CHUNK = 256  # the most entries whose squares are summed in fp32
_MANY = 1 << 15  # entries of a block, from which on fp64 costs more than the calls that avoid it


def refusal(delta: Tensor, rows: Rows) -> str | None:
    if not delta.is_cpu:
        return f"it is on {delta.device}, not in the memory of the CPU"
    if delta.dtype not in _DTYPES:
        return f"it is of {delta.dtype}, not of one of {_DTYPES}"
    if not delta.is_contiguous():
        return "it is not contiguous"
    if rows.unit is not None:
        return "its rows have units of their own, and are not scaled by one number"
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
    grad_norm, delta_norm, finite = map(sweep.joined, zip(*(sweep.move(one, *block) for block in blocks), strict=True))
    return Stepped(moved, grad_norm.to(_wide(one.grad)), delta_norm.to(_wide(moved)), finite)


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
    return sweep.joined([sweep.norms(*block) for block in sweep.blocks(delta)]).to(_wide(delta))


class _Hidden(NamedTuple):
    """The masked positions of a block."""

    flags: Tensor  # (rows, positions, 1) bool
    bits: Tensor  # (rows, positions, 1) int32: a bit mask for entries of fp32, all ones or all zeros

    @property
    def rows(self) -> Tensor | None:
        """The rows that are masked as a whole, if a row is one position; otherwise they are few, and not searched for."""
        return self.flags.view(-1) if self.flags.shape[1] == 1 else None


class _Lengths(NamedTuple):
    """The norms of a block's rows, and the least and the largest of those that are not hidden."""

    values: Tensor
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor, hidden: _Hidden | None) -> _Lengths:
        rows = None if hidden is None else hidden.rows
        low, high = torch.aminmax(values if rows is None else values.masked_fill(rows, values.amax()))
        return cls(values, low.item(), high.item())


class _Sweep:
    """A perturbation cut into blocks, the operations on a block, and their memory."""

    def __init__(self, like: Tensor, rows: Rows) -> None:
        axes = like.ndim - 1 if rows.per == "token" else 1
        self.rows, self.norm = like.shape[:axes], rows.norm
        self.count = math.prod(self.rows)
        self.size = like.numel() // self.count
        mask = None if rows.mask is None or rows.mask.all() else rows.mask
        if mask is not None:
            if mask.ndim < axes:  # one entry for several rows
                mask = mask.reshape(*mask.shape, *[1] * (axes - mask.ndim)).expand(self.rows)
            mask = mask.reshape(self.count, -1, 1)
        self.positions = 1 if mask is None else mask.shape[1]
        self.hidden = None if mask is None else _Hidden(~mask, mask.to(torch.int32).neg_())
        self.chunk = _chunk(self.size // self.positions)
        self.height = max(1, _BYTES // (8 * self.size))
        self.least = math.sqrt(self.size) * 1e-15  # squares that vanish in fp32 do not matter to a row as long as this
        self.scratch: dict[str, Tensor] = {}

    def blocks(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The same rows of every tensor (None for None), and their hidden positions."""
        whole = [None if t is None else t.reshape(self.count, self.size) for t in tensors]
        if self.count <= self.height:
            yield (*whole, self.hidden)
            return
        for start in range(0, self.count, self.height):
            block = slice(start, start + self.height)
            hidden = None if self.hidden is None else _Hidden(*(t[block] for t in self.hidden))
            yield (*(None if t is None else t[block] for t in whole), hidden)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the results of every block, in the shape of the rows."""
        rows = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
        return rows if len(self.rows) == 1 else rows.view(self.rows)

    def move(
        self, one: Move, delta: Tensor, grad: Tensor, x: Tensor | None, out: Tensor, hidden: _Hidden | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The norms of the gradient and of the result in `out`, and whether the gradient is finite."""
        lengths = factors = None
        if torch.float64 not in (delta.dtype, grad.dtype):
            grad = self._single(grad, "gradient")
            lengths = self._lengths(grad, hidden)
            factors = _factors(lengths, one)
        if lengths is None or factors is None:
            region = replace(one.region, x=None if x is None else self._apart(x))
            same = replace(
                one, delta=self._apart(delta), grad=self._apart(grad), rows=self._rows(hidden), region=region
            )
            made = _reference.move([same], inplace=False)[0]
            self._apart(out).copy_(made.delta)
            return made.grad_norm, made.delta_norm, made.finite
        fresh = out.dtype == torch.float32 and out.data_ptr() != delta.data_ptr()
        delta = self._single(delta, "delta")
        work = out if out.dtype == torch.float32 else delta
        if one.rule == "normalised":
            torch.addcmul(delta, grad, factors, out=work)
        else:
            signs = one.rule == "sign"
            direction = torch.sign(grad, out=work if fresh else self._room(grad, "sign")) if signs else grad
            torch.add(delta, direction, alpha=one.step_size, out=work)
        moved = self._contain(work, x, out, hidden, one.region)
        if moved is None:
            moved = self._lengths(work, hidden).values
        return lengths.values, moved, torch.ones(len(out), dtype=torch.bool)

    def project(self, delta: Tensor, x: Tensor | None, out: Tensor, hidden: _Hidden | None, region: Region) -> None:
        if delta.dtype == torch.float64:
            region = replace(region, x=None if x is None else self._apart(x))
            self._apart(out).copy_(_reference.project(self._apart(delta), self._rows(hidden), region))
        else:
            work = out if out.dtype == torch.float32 else self._room(delta, "delta")
            self._contain(work.copy_(delta), x, out, hidden, region)

    def norms(self, delta: Tensor, hidden: _Hidden | None) -> Tensor:
        if delta.dtype == torch.float64:
            return _reference.norms(self._apart(delta), self._rows(hidden))
        return self._lengths(self._single(delta, "delta"), hidden).values

    def _apart(self, values: Tensor) -> Tensor:
        """A block with its positions in an axis of their own, as the definition has them."""
        return values.view(len(values), self.positions, -1)

    def _rows(self, hidden: _Hidden | None) -> Rows:
        """A block's rows, as the definition knows them."""
        return Rows(norm=self.norm, mask=None if hidden is None else ~hidden.flags.squeeze(2))

    def _contain(
        self, work: Tensor, x: Tensor | None, out: Tensor, hidden: _Hidden | None, region: Region
    ) -> Tensor | None:
        """Project `out` into the ball and the box, in its dtype; `work` ends equal to it. Returns the norms, if known."""
        radius, lengths = region.radius, None
        shrinks = self.norm == "l2" and math.isfinite(radius)
        self._clear(work, hidden)
        if shrinks:
            lengths, _ = self._shrink(work, radius, out.dtype, hidden)
        elif math.isfinite(radius):
            bound = _reference.not_above(radius, out.dtype)
            work.clamp_(-bound, bound)
        if work is not out:
            work.copy_(out.copy_(work))
            if shrinks:  # rounded to storage, a row may have grown out of its ball
                lengths, outside = self._shrink(work, radius, out.dtype, hidden)
                if outside:
                    work.copy_(out.copy_(work))
                    lengths = None
        if region.box is not None and x is not None:
            if work is out and x.dtype != torch.float64:
                self._box(work, self._single(x, "x"), region.box)
                self._clear(work, hidden)  # x may be NaN there
            else:
                work.copy_(out.copy_(_reference.boxed(out, x, region.box)))
            lengths = None
        return lengths

    def _clear(self, work: Tensor, hidden: _Hidden | None) -> None:
        if hidden is not None:  # NaN too; a masked fill takes ten times as long
            self._apart(work).view(torch.int32).bitwise_and_(hidden.bits)

    def _shrink(
        self, work: Tensor, radius: float, storage: torch.dtype, hidden: _Hidden | None
    ) -> tuple[Tensor | None, bool]:
        """Rescale the rows outside the ball: the norms, where they are known, and whether there were such rows."""
        limit, target = _reference.bounds(radius, self.size, torch.float32, storage)
        length, _, high = self._exact(work, radius, hidden)
        if high <= limit:
            return length, False
        outside = length > limit
        if not math.isfinite(high):  # a row that is infinite stays so
            outside &= length.isfinite()
        scale = torch.where(outside, target / length, 1.0)
        if target >= high * 1e-30:
            work.mul_(scale.to(work.dtype).view(-1, 1))
        else:  # as a number of fp32, the scale would be short of digits
            torch.mul(work.to(torch.float64), scale.view(-1, 1), out=work)
        return (length * scale if target >= self.least else None), True

    def _box(self, work: Tensor, x: Tensor, box: Box) -> None:
        """As `_reference.boxed`, without its comparisons: an entry that only rounds to the edge is brought to it.

        Where x is NaN, so is the entry.
        """
        low, high = (x.new_tensor(bound) for bound in box)
        edge, size = self._room(x, "edge"), torch.abs(work, out=self._room(x, "size"))
        torch.minimum(work, torch.sub(high, x, out=edge), out=work)
        torch.maximum(work, torch.sub(low, x, out=edge), out=work)
        torch.clamp(work, torch.neg(size, out=edge), size, out=work)  # if x itself is outside, the ball decides

    def _exact(self, work: Tensor, radius: float, hidden: _Hidden | None) -> _Lengths:
        """The norms that tell whether a row is in its ball; see the module's docstring. Masked positions are zero by now."""
        shared = self.count > self.height  # with several blocks; for a single one, new memory costs more than it saves
        if shared and radius >= self.least and self.size % 4 == 0:
            first, *others = work.chunk(4, 1)
            fours = torch.mul(first, first, out=self._room(first, "fours"))
            for other in others:
                fours.addcmul_(other, other)
            wide = self._room(first, "sums", torch.float64).copy_(fours)  # sum(dtype=...) would take new memory for it
            lengths = _Lengths.of(wide.sum(1).sqrt(), hidden)
            if self.least <= lengths.low and math.isfinite(lengths.high):
                return lengths
        return _Lengths.of(vector_norm(work, dim=1, dtype=torch.float64), hidden)

    def _lengths(self, values: Tensor, hidden: _Hidden | None) -> _Lengths:
        """The norms of a block's rows, in fp64 or, Linf, in fp32, which holds them."""
        if self.norm == "linf":
            values = self._apart(values)
            parts = _visible(torch.maximum(values.amax(2), values.amin(2).neg_()), hidden)
            return _Lengths.of(parts.amax(1), hidden)
        if values.numel() >= _MANY and self.chunk <= _CHUNK:
            parts = _visible(vector_norm(values.view(len(values), -1, self.chunk), dim=2), hidden)
            lengths = _Lengths.of(vector_norm(parts, dim=1, dtype=torch.float64), hidden)
            if self.least <= lengths.low and lengths.high <= 1e18:
                return lengths  # no square has overflowed, and those that vanished do not matter beside the sum
        if hidden is None:
            return _Lengths.of(vector_norm(values, dim=1, dtype=torch.float64), hidden)
        parts = vector_norm(self._apart(values), dim=2, dtype=torch.float64)
        return _Lengths.of(vector_norm(_visible(parts, hidden), dim=1), hidden)

    def _single(self, values: Tensor, use: str) -> Tensor:
        return values if values.dtype == torch.float32 else self._room(values, use).copy_(values)

    def _room(self, like: Tensor, use: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a block, the same for every block."""
        if use not in self.scratch:
            self.scratch[use] = torch.empty(like.shape, dtype=dtype)  # the first block: none is larger
        return self.scratch[use][: len(like)]


def _visible(parts: Tensor, hidden: _Hidden | None) -> Tensor:
    """Set the measures of a block's positions to 0 at those that are masked."""
    if hidden is not None:
        parts.view(len(parts), hidden.flags.shape[1], -1).masked_fill_(hidden.flags, 0.0)
    return parts


def _factors(lengths: _Lengths, one: Move) -> Tensor | None:
    """The factor of every row's direction, `(rows, 1)`; None if fp32 does not suffice."""
    values, low, high = lengths
    step = abs(one.step_size)
    if not math.isfinite(high):
        return None
    if one.rule != "normalised":
        return values if one.rule == "sign" or high * step < 1e30 else None
    values = values.to(torch.float64)  # the reciprocal of a subnormal overflows in fp32
    if one.floor:
        values, low, high = values.clamp(min=one.floor), max(low, one.floor), max(high, one.floor)
    elif low == 0:  # such a row does not move
        values = values.masked_fill(values == 0, math.inf)
        low = values.amin().item()
    if high > step * 1e30 or low < step * 1e-30:
        return None
    return (one.step_size / values).to(torch.float32).view(-1, 1)


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


@cache
def _chunk(entries: int) -> int:
    """The length of the chunks into which the entries are cut; all entries if they do not divide well."""
    longest = next(size for size in range(min(entries, _CHUNK), 0, -1) if entries % size == 0)
    return longest if longest >= 32 else entries
