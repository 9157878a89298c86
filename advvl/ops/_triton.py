"""The Triton back end: CUDA tensors in fp32, fp16 and bf16; on a CPU only through Triton's interpreter, for tests.

A row of up to 16,384 entries is one program's: d and g are read once into registers, everything follows from there, and
the new row is written once. Short rows share a program. Longer rows are cut into blocks so that a few of them fill the
chip: one launch sums every block, one applies the step, one joins the norms. Every perturbation of a call has launches of
its own, one in the first case, three or four in the second. None waits for the host, so all can be captured in a graph.

Entries are computed in fp32, a gradient of fp64 rounded to it first, and sums of squares in fp64: squares of fp32 numbers
neither over- nor underflow there, so a gradient of 1e-30 needs no pass for its maximum, and the order of summation, which
is the compiler's, does not matter. A row's fp64 factor is applied as m * p, m in [1/2, 1) and p a power of two, which
loses nothing at either end of fp32.

How a result stays inside its ball. Let u = 2^-24, half a unit in the last place of fp32; e the rounding to the storage
dtype (0 for fp32), at most 2^-11 or 2^-8; w = fl(d + fl(a h)) the moved row, h the gradient or its sign. Norms of w known
in fp64 are exact beside u. A row outside of `limit = radius (1 - 4u)` is brought to `target = radius (1 - 10u - e)`. The
factor rounds once, the product once, the cast once: its norm grows by at most 2u + e, and a second projection finds it
inside. Below the normal numbers product and cast err by parts of a subnormal an entry, which the target leaves room for.

A long row is not read again for ||w||: ||d||^2 + 2a<d,h> + a^2||h||^2, in fp64, is the norm of v = d + a h before its
entries were rounded, and |w - v| <= u|v| + u(1 + u)|a h| entry by entry. Where ||v|| is at least half of ||d|| + a||h||,
||w|| is within 1 + 3.01u of ||v||: such a row left alone is inside the radius, and one brought to the target ends below
radius (1 - 10u - e)(1 + 5.01u + e) < limit. Any other row, one whose step nearly reverses it, is summed again from w. So
is one that the cast may or may not carry out of the ball, and every row of a radius so small that subnormals matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from advvl.ops import _reference
from advvl.ops._reference import not_above
from advvl.ops._types import Move, Region, Rows, Rule, Stepped

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LONGEST = 16_384  # entries of the longest row that one program holds, beside its gradient, in registers
_TILE = 1024  # entries of a program of several short rows
_BLOCK = 4096  # entries of a block of a long row; up to four times that once a row has more than _BLOCKS of them
_BLOCKS = 128
_TRUSTED = 0.25  # of (||d|| + a||h||)^2: where the algebra gives the norm; see above
_NEVER = 2.0
_NORMAL = tl.constexpr(2.0**-126)  # the smallest fp32 number that has all its bits


@triton.jit
def _read(values, offset, real):
    return tl.load(values + offset, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _real(mask, row, column, inside, each, COVER: tl.constexpr):
    """Which entries are real: `each` entries of the mask to a row, each for COVER of its own; COVER 0: one to `each` rows.

    The row is one that exists.
    """
    if mask is not None:
        if COVER > 0:
            inside = inside & (tl.load(mask + row * each + column // COVER, mask=inside, other=0) != 0)
        else:
            inside = tl.where(tl.load(mask + row // each) != 0, inside, False)
    return inside


@triton.jit
def _measure(values, L2: tl.constexpr, AXIS: tl.constexpr):
    """The sum of squares, or the largest size, in fp64."""
    if L2:
        wide = values.to(tl.float64)
        measure = tl.sum(wide * wide, AXIS)
    else:
        # As integers sizes keep their order, with NaN above infinity; a maximum of floats would drop it.
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        measure = tl.max(bits, AXIS).to(tl.float32, bitcast=True).to(tl.float64)
    return measure


@triton.jit
def _joined(parts, row, count, slot, SLOTS: tl.constexpr, L2: tl.constexpr, PARTS: tl.constexpr):
    """One measure of a row from those of its parts."""
    part = tl.arange(0, PARTS)
    values = tl.load(parts + (row * count + part) * SLOTS + slot, mask=part < count, other=0.0)
    if L2:  # noqa: SIM108
        joined = tl.sum(values, 0)
    else:
        joined = tl.max(values.to(tl.int64, bitcast=True), 0).to(tl.float64, bitcast=True)
    return joined


@triton.jit
def _length(measure, L2: tl.constexpr):
    if L2:
        measure = tl.sqrt(measure)
    return measure


@triton.jit
def _split(factor):
    """m, p with m * p the factor, m in [1/2, 1) of fp32 and p a power of two; m is 0 where it would be subnormal."""
    exponent = ((factor.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
    exponent = tl.minimum(tl.maximum(exponent, -126), 127)
    p = ((exponent + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)
    m = (factor / p.to(tl.float64)).to(tl.float32)
    return tl.where(tl.abs(m) < _NORMAL, 0.0, m), p


@triton.jit
def _pace(length, step, floor, SIGN: tl.constexpr):
    """Whether a row with a gradient of this length moves, and the factor of its direction."""
    moves = (length > 0) & (length < float("inf"))
    over = 1.0 if SIGN else tl.maximum(length, floor)
    m, p = _split(step / tl.where(moves, over, 1.0).to(tl.float64))
    return moves, m, p


@triton.jit
def _direction(g, SIGN: tl.constexpr):
    if SIGN:
        g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    return g


@triton.jit
def _moved(d, g, moves, m, p, SIGN: tl.constexpr):
    return d + tl.where(moves, (_direction(g, SIGN) * p) * m, 0.0)


@triton.jit
def _outside(length, limit):
    return (length > limit) & (length < float("inf"))  # a row that is not finite stays as it is


@triton.jit
def _clamped(w, bound):
    return tl.where(w > bound, bound, tl.where(w < -bound, -bound, w))  # NaN stays


@triton.jit
def _fitted(w, x, offset, real, low, high, STORED: tl.constexpr):
    """The entries as they are stored, in fp32, in their box: only those outside change, towards zero, and never grow."""
    d = w.to(STORED).to(tl.float32)
    if x is not None:
        wide = _read(x, offset, real)
        total, size = wide + d, tl.abs(d)
        down = tl.minimum(d, tl.maximum((high - wide).to(STORED).to(tl.float32), -size))
        up = tl.maximum(d, tl.minimum((low - wide).to(STORED).to(tl.float32), size))
        d = tl.where(total > high, down, tl.where(total < low, up, d))
    return d


@triton.jit
def _rows_kernel(
    delta, grad, x, mask, out, grad_norm, finite, delta_norm,
    rows, size, each,
    step: tl.float64, floor: tl.float64, limit: tl.float64, target: tl.float64, bound, low, high,
    L2: tl.constexpr, SIGN: tl.constexpr, BALL: tl.constexpr,
    COVER: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)[None, :]
    there = row < rows
    inside = there[:, None] & (column < size)
    offset = row[:, None] * size + column
    real = _real(mask, tl.minimum(row, rows - 1)[:, None], column, inside, each, COVER)
    w = _read(delta, offset, real)
    if grad is not None:
        g = _read(grad, offset, real)
        length = _length(_measure(g, L2, 1), L2)
        moves, m, p = _pace(length, step, floor, SIGN)
        w = _moved(w, g, moves[:, None], m[:, None], p[:, None], SIGN)
        tl.store(grad_norm + row, length.to(tl.float32), mask=there)
        tl.store(finite + row, (length < float("inf")).to(tl.uint8), mask=there)
    if BALL and L2:
        length = tl.sqrt(_measure(w, L2, 1))
        over = _outside(length, limit)
        if out.dtype.element_ty != tl.float32:  # the cast may lengthen a row
            over = over | _outside(tl.sqrt(_measure(w.to(out.dtype.element_ty).to(tl.float32), L2, 1)), limit)
        m, p = _split(target / tl.where(over, length, 1.0))
        w = tl.where(over[:, None], (w * m[:, None]) * p[:, None], w)
    elif BALL:
        w = _clamped(w, bound)
    if out is not None:
        w = _fitted(w, x, offset, real, low, high, out.dtype.element_ty)
        tl.store(out + offset, w.to(out.dtype.element_ty), mask=inside)
    if delta_norm is not None:
        tl.store(delta_norm + row, _length(_measure(w, L2, 1), L2).to(tl.float32), mask=there)


@triton.jit
def _block(program, mask, size, each, blocks, COVER: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program's block of its row lies."""
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    return row * size + column, inside, _real(mask, row, column, inside, each, COVER)


@triton.jit
def _sums_kernel(
    delta, grad, mask, sums, size, each, blocks,
    L2: tl.constexpr, SIGN: tl.constexpr, SLOTS: tl.constexpr, COVER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's measure of g and, with four slots, ||d||^2, <d, h> and ||h||^2."""
    program = tl.program_id(0).to(tl.int64)
    offset, _inside, real = _block(program, mask, size, each, blocks, COVER, BLOCK)
    sums += program * SLOTS
    if grad is not None:
        g = _read(grad, offset, real)
        tl.store(sums, _measure(g, L2, 0))
    if SLOTS == 4:
        d = _read(delta, offset, real)
        tl.store(sums + 1, _measure(d, True, 0))
        if grad is not None:
            h = _direction(g, SIGN)
            tl.store(sums + 2, tl.sum(d.to(tl.float64) * h.to(tl.float64), 0))
            tl.store(sums + 3, _measure(h, True, 0))


@triton.jit
def _verdict(
    sums, row, parts, step, floor, limit, safe, trusted,
    MOVES: tl.constexpr, L2: tl.constexpr, SIGN: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row's pace, its length once moved, as far as sums can tell, and whether that is in doubt."""
    moves, m, p = False, 0.0, 0.0
    length, doubtful = 0.0, False
    if MOVES:
        moves, m, p = _pace(_length(_joined(sums, row, parts, 0, SLOTS, L2, PARTS), L2), step, floor, SIGN)
    if SLOTS == 4:
        square = _joined(sums, row, parts, 1, SLOTS, True, PARTS)
        longest = tl.sqrt(square)
        if MOVES:
            a = tl.cast(m, tl.float64) * tl.cast(p, tl.float64)
            dh = _joined(sums, row, parts, 2, SLOTS, True, PARTS)
            hh = _joined(sums, row, parts, 3, SLOTS, True, PARTS)
            square += tl.where(moves, a * (2.0 * dh + a * hh), 0.0)
            longest += tl.where(moves, tl.abs(a) * tl.sqrt(hh), 0.0)
        length = tl.sqrt(square)
        known = (square >= trusted * (longest * longest)) & ((length > limit) | (length <= safe))
        doubtful = known == 0
    return moves, m, p, length, doubtful


@triton.jit
def _again_kernel(
    delta, grad, mask, out, sums, again, size, each, blocks, parts,
    step: tl.float64, floor: tl.float64, limit: tl.float64, safe: tl.float64, trusted: tl.float64,
    SIGN: tl.constexpr, COVER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """For rows in doubt the sums of squares of the moved block, before and after the cast."""
    program = tl.program_id(0).to(tl.int64)
    moves, m, p, _moved_length, doubtful = _verdict(
        sums, program // blocks, parts, step, floor, limit, safe, trusted, grad is not None, True, SIGN, 4, PARTS
    )
    if doubtful:
        offset, _inside, real = _block(program, mask, size, each, blocks, COVER, BLOCK)
        w = _read(delta, offset, real)
        if grad is not None:
            w = _moved(w, _read(grad, offset, real), moves, m, p, SIGN)
        tl.store(again + program * 2, _measure(w, True, 0))
        tl.store(again + program * 2 + 1, _measure(w.to(out.dtype.element_ty).to(tl.float32), True, 0))


@triton.jit
def _apply_kernel(
    delta, grad, x, mask, out, sums, again, stored, size, each, blocks, parts,
    step: tl.float64, floor: tl.float64, limit: tl.float64, safe: tl.float64, trusted: tl.float64,
    target: tl.float64, bound, low, high,
    L2: tl.constexpr, SIGN: tl.constexpr, BALL: tl.constexpr,
    SLOTS: tl.constexpr, COVER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Backwards: what was summed last is still in the cache.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    offset, inside, real = _block(program, mask, size, each, blocks, COVER, BLOCK)
    moves, m, p, length, doubtful = _verdict(
        sums, program // blocks, parts, step, floor, limit, safe, trusted, grad is not None, L2, SIGN, SLOTS, PARTS
    )
    w = _read(delta, offset, real)
    if grad is not None:
        w = _moved(w, _read(grad, offset, real), moves, m, p, SIGN)
    if BALL and L2:
        over = _outside(length, limit)
        if doubtful:
            length = tl.sqrt(_joined(again, program // blocks, parts, 0, 2, True, PARTS))
            cast = tl.sqrt(_joined(again, program // blocks, parts, 1, 2, True, PARTS))
            over = _outside(length, limit) | _outside(cast, limit)
        m, p = _split(target / tl.where(over, length, 1.0))
        w = tl.where(over, (w * m) * p, w)
    elif BALL:
        w = _clamped(w, bound)
    w = _fitted(w, x, offset, real, low, high, out.dtype.element_ty)
    tl.store(out + offset, w.to(out.dtype.element_ty), mask=inside)
    if stored is not None:
        tl.store(stored + program, _measure(w, L2, 0))


@triton.jit
def _norms_kernel(
    sums, stored, grad_norm, finite, delta_norm, parts,
    L2: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if sums is not None:
        length = _length(_joined(sums, row, parts, 0, SLOTS, L2, PARTS), L2)
        tl.store(grad_norm + row, length.to(tl.float32))
        tl.store(finite + row, (length < float("inf")).to(tl.uint8))
    if stored is not None:
        tl.store(delta_norm + row, _length(_joined(stored, row, parts, 0, 1, L2, PARTS), L2).to(tl.float32))


_INTERPRETED = not isinstance(_rows_kernel, triton.JITFunction)


class _Job(NamedTuple):
    """One perturbation's work: contiguous tensors, where the results go (None: not wanted), and what to do."""

    delta: Tensor
    grad: Tensor | None
    rows: Rows
    region: Region
    out: Tensor | None
    grad_norm: Tensor | None
    finite: Tensor | None
    delta_norm: Tensor | None
    step_size: float = 0.0
    floor: float = 0.0
    rule: Rule = "normalised"


class _Ball(NamedTuple):
    """The numbers that the kernels compare and scale with; see the top of the file."""

    limit: float
    safe: float
    target: float
    trusted: float
    bound: float


def refusal(delta: Tensor, rows: Rows) -> str | None:
    if delta.dtype not in _DTYPES:
        return f"it computes in fp32, for {[str(dtype).removeprefix('torch.') for dtype in _DTYPES]}, not {delta.dtype}"
    if not delta.is_cuda and not (_INTERPRETED and delta.device.type == "cpu"):
        return f"it needs a CUDA tensor, not one on {delta.device}"
    for name, other in (("mask", rows.mask), ("segments", rows.segments)):
        if other is not None and other.device != delta.device:
            return f"the {name} is on {other.device}, the perturbation on {delta.device}"
    return None


def move(moves: Sequence[Move], *, inplace: bool) -> list[Stepped]:
    return [_move(one, inplace) for one in moves]


def _move(one: Move, inplace: bool) -> Stepped:
    if one.delta.numel() == 0:
        return _reference.move([one], inplace=inplace)[0]
    delta = one.delta.contiguous()
    grad_norm, delta_norm = _per_row(delta, one.rows), _per_row(delta, one.rows)
    finite = torch.empty_like(grad_norm, dtype=torch.bool)
    out = delta if inplace else torch.empty_like(delta)
    _run(
        _Job(
            delta, one.grad.contiguous(), one.rows, one.region, out, grad_norm, finite, delta_norm,
            one.step_size, one.floor, one.rule,
        )
    )  # fmt: skip
    if inplace and out is not one.delta:
        one.delta.copy_(out)
    elif inplace:
        torch.autograd.graph.increment_version(out)  # as any operation of torch's would
    return Stepped(one.delta if inplace else out, grad_norm, delta_norm, finite)


def project(delta: Tensor, rows: Rows, region: Region) -> Tensor:
    if delta.numel() == 0:
        return _reference.project(delta, rows, region)
    delta = delta.contiguous()
    out = torch.empty_like(delta)
    _run(_Job(delta, None, rows, region, out, None, None, None))
    return out


def norms(delta: Tensor, rows: Rows) -> Tensor:
    if delta.numel() == 0:
        return _reference.norms(delta, rows)
    found = _per_row(delta, rows)
    _run(_Job(delta.contiguous(), None, rows, Region(), None, None, None, found))
    return found


def _per_row(delta: Tensor, rows: Rows) -> Tensor:
    shape = delta.shape[:-1] if rows.per == "token" else delta.shape[:1]
    return torch.empty(shape, dtype=torch.float32, device=delta.device)


def _run(job: _Job) -> None:
    rows, delta = job.rows, job.delta
    packed = rows.segments is not None and rows.per == "sample"
    size = delta.shape[-1] if rows.per == "token" else math.prod(delta.shape[1:])
    with torch.cuda.device_of(delta):
        if size <= _LONGEST and not packed:
            _run_rows(job, size)
        else:
            _run_blocks(job, size, rows.segments if packed else None)


def _run_rows(job: _Job, size: int) -> None:
    ball = _ball(job.region.radius, job.delta.dtype, size, job.grad is not None)
    mask, each, cover = _masked(job, size)
    width = _power_of_2(size)
    together = max(1, _TILE // width)
    rows = job.delta.numel() // size
    low, high, x = _boxed(job)
    _rows_kernel[(_ratio(rows, together),)](
        job.delta, job.grad, x, mask, job.out, job.grad_norm, _bytes(job.finite), job.delta_norm,
        rows, size, each,
        float(job.step_size), float(job.floor), ball.limit, ball.target, ball.bound, low, high,
        L2=job.rows.norm == "l2", SIGN=job.rule == "sign", BALL=math.isfinite(job.region.radius),
        COVER=cover, ROWS=together, SIZE=width, num_warps=_warps(together * width),
    )  # fmt: skip


def _run_blocks(job: _Job, size: int, segments: Tensor | None) -> None:
    delta, grad, l2, sign = job.delta, job.grad, job.rows.norm == "l2", job.rule == "sign"
    within = math.isfinite(job.region.radius)
    rows = delta.numel() // size
    ball = _ball(job.region.radius, delta.dtype, size if segments is None else delta.numel(), grad is not None)
    mask, each, cover = _masked(job, size)
    width = min(max(_BLOCK, _power_of_2(_ratio(size, _BLOCKS))), 4 * _BLOCK)
    blocks = _ratio(size, width)
    grid, warps = (rows * blocks,), _warps(width)
    slots = 4 if l2 and within else 1
    parts = blocks if segments is None else 1
    joins = _power_of_2(parts)

    def empty(count: int) -> Tensor:
        return torch.empty(rows, blocks, count, dtype=torch.float64, device=delta.device)

    sums, samples, again, stored = None, None, None, None
    if grad is not None or slots == 4:
        sums = empty(slots)
        _sums_kernel[grid](
            delta, grad, mask, sums, size, each, blocks,
            L2=l2, SIGN=sign, SLOTS=slots, COVER=cover, BLOCK=width, num_warps=warps,
        )  # fmt: skip
        sums, samples = _gathered(sums, segments, l2)
    judged = float(job.step_size), float(job.floor), ball.limit, ball.safe, ball.trusted
    if slots == 4:
        again = empty(2)
        _again_kernel[grid](
            delta, grad, mask, job.out, sums, again, size, each, blocks, parts, *judged,
            SIGN=sign, COVER=cover, BLOCK=width, PARTS=joins, num_warps=warps,
        )  # fmt: skip
        again, _ = _gathered(again, segments, l2)
    if job.out is None:
        stored = empty(1)
        _sums_kernel[grid](
            None, delta, mask, stored, size, each, blocks,
            L2=l2, SIGN=False, SLOTS=1, COVER=cover, BLOCK=width, num_warps=warps,
        )  # fmt: skip
    else:
        stored = empty(1) if job.delta_norm is not None else None
        low, high, x = _boxed(job)
        _apply_kernel[grid](
            delta, grad, x, mask, job.out, sums, again, stored, size, each, blocks, parts, *judged,
            ball.target, ball.bound, low, high,
            L2=l2, SIGN=sign, BALL=within, SLOTS=slots, COVER=cover, BLOCK=width, PARTS=joins, num_warps=warps,
        )  # fmt: skip
    if stored is not None:
        _, stored = _gathered(stored, segments, l2)
        _norms_kernel[(rows,)](
            None if grad is None else samples, stored, job.grad_norm, _bytes(job.finite), job.delta_norm, parts,
            L2=l2, SLOTS=slots, PARTS=joins, num_warps=1,
        )  # fmt: skip


def _gathered(parts: Tensor, segments: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    """Measures of the parts of every row `(rows, parts, slots)`: as a row needs them, and as a sample has them.

    Packed, a row needs those of its whole sample.
    """
    if segments is None:
        return parts, parts
    samples = parts.new_zeros(parts.shape[0], parts.shape[2])
    if l2:
        samples.index_add_(0, segments, parts.sum(1))
    else:
        samples.scatter_reduce_(0, segments.unsqueeze(1), parts.amax(1), "amax")
    samples = samples.unsqueeze(1)
    return samples[segments], samples


@cache
def _ball(radius: float, storage: torch.dtype, entries: int, moves: bool) -> _Ball:
    """The ball of rows of this many entries; a row that does not move is stored as it was, so its cast is exact."""
    stored, u, half, root = torch.finfo(storage), 2.0**-24, storage != torch.float32, math.sqrt(entries)
    e, subnormal = (stored.eps / 2, stored.smallest_normal * stored.eps) if half else (0.0, 0.0)
    limit = radius * (1 - 4 * u)
    return _Ball(
        limit=limit,
        safe=(limit - subnormal / 2 * root) / (1 + e + 8 * u) if half and moves else limit,
        # Where the product is subnormal it is off by half of one, and before it by a quarter.
        target=max(0.0, radius * (1 - 10 * u - e) - (subnormal / 2 + 0.75 * 2.0**-149) * root),
        trusted=_TRUSTED if radius > 2.0**-100 else _NEVER,
        bound=not_above(radius, storage) if math.isfinite(radius) else 0.0,
    )


def _masked(job: _Job, size: int) -> tuple[Tensor | None, int, int]:
    """The mask, and how it lies over rows of this size; see `_real`."""
    mask = job.rows.mask
    if mask is None:
        return None, 1, 0
    covered = job.delta.numel() // mask.numel()
    return _bytes(mask), *((covered // size, 0) if covered >= size else (size // covered, covered))


def _boxed(job: _Job) -> tuple[float, float, Tensor | None]:
    if job.region.box is None or job.region.x is None:
        return 0.0, 0.0, None
    low, high = job.region.box
    return float(low), float(high), job.region.x.contiguous()


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous().view(torch.uint8)


# Triton's own two of these may be called in kernels as well, and take longer than all else that the host does.
def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _ratio(whole: int, part: int) -> int:
    """Rounded up."""
    return -(-whole // part)


def _warps(entries: int) -> int:
    """Sixteen entries a thread: enough loads of 16 bytes under way, few enough registers; thirty-two in the longest rows."""
    return min(max(entries // 512, 1), 16)
