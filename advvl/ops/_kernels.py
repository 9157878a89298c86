"""The kernels of the Triton back end, and why a row that they store is inside its ball.

Entries are computed in fp32, a gradient of fp64 rounded to it first, and sums of squares in fp64: squares of fp32 numbers
neither over- nor underflow there, so a gradient of 1e-30 needs no pass for its maximum, and the order of summation, which
is the compiler's, does not matter. A row's fp64 factor is applied as m * p, m in [1/2, 1) and p a power of two, which
loses nothing at either end of fp32.

How a result stays inside its ball. Let u = 2^-24, half a unit in the last place of fp32; e the rounding to the storage
dtype (0 for fp32), at most 2^-11 or 2^-8; w = fl(d + fl(a h)) the moved row, h the gradient or its sign and a the step
size, over the gradient's norm where the rule normalises. A plain step, which alone knows no bound, is taken only where
a||h|| < 2^126, and so overflows in no entry. Norms of w known in fp64 are exact beside u. A row outside of `limit =
radius (1 - 4u)` is brought to `target = radius (1 - 10u - e)`. The factor rounds once, the product once, the cast once:
its norm grows by at most 2u + e, and a second projection finds it inside. Below the normal numbers product and cast err
by parts of a subnormal an entry, which the target leaves room for.

A long row is not read again for ||w||: ||d||^2 + 2a<d,h> + a^2||h||^2, in fp64, is the norm of v = d + a h before its
entries were rounded, and |w - v| <= u|v| + u(1 + u)|a h| entry by entry. Where ||v|| is at least half of ||d|| + a||h||,
||w|| is within 1 + 3.01u of ||v||: such a row left alone is inside the radius, and one brought to the target ends below
radius (1 - 10u - e)(1 + 5.01u + e) < limit. Any other row, one whose step nearly reverses it, is summed again from w. So
is one that the cast may or may not carry out of the ball, and every row of a radius so small that subnormals matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NORMAL = tl.constexpr(2.0**-126)  # the smallest fp32 number that has all its bits
_LONGEST_STEP = tl.constexpr(2.0**126)


@triton.jit
def _read(values, offset, real):
    return tl.load(values + offset, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _both(delta, grad, offset, real):
    """The entries of d and g; None where there are none.

    All loads start before the first wait. Without the barrier, which itself waits for no load, the assembler would move
    them down to their first use, behind sums and divisions that do not need them.
    """
    d, g = None, None
    if delta is not None:
        d = _read(delta, offset, real)
    if delta is not None and grad is not None:
        tl.debug_barrier()
    if grad is not None:
        g = _read(grad, offset, real)
    return d, g


@triton.jit
def _real(mask, row, column, inside, each, COVER: tl.constexpr):
    """The real entries: a row has `each` entries of the mask, each for COVER of its own; COVER 0: one for `each` rows.

    The row must exist.
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
    over_p = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)  # its product is exact, as a division is
    m = (factor * over_p).to(tl.float32)
    return tl.where(tl.abs(m) < _NORMAL, 0.0, m), p


@triton.jit
def _pace(length, step, floor, RULE: tl.constexpr):
    """Return a flag for a row that moves with a gradient of this length, and the factor of its direction."""
    moves = (length > 0) & (length < float("inf"))
    if RULE == "plain":
        moves = moves & (tl.abs(step) * length < _LONGEST_STEP)
    over = tl.maximum(length, floor) if RULE == "normalised" else 1.0
    m, p = _split(step / tl.where(moves, over, 1.0).to(tl.float64))
    return moves, m, p


@triton.jit
def _direction(g, RULE: tl.constexpr):
    if RULE == "sign":
        g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    return g


@triton.jit
def _moved(d, g, moves, m, p, RULE: tl.constexpr):
    return d + tl.where(moves, (_direction(g, RULE) * p) * m, 0.0)


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
def rows_kernel(
    delta, grad, x, mask, out, grad_norm, finite, delta_norm,
    rows, size, each,
    step: tl.float64, floor: tl.float64, limit: tl.float64, safe: tl.float64, target: tl.float64, bound, low, high,
    L2: tl.constexpr, RULE: tl.constexpr, BALL: tl.constexpr,
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
        moves, m, p = _pace(length, step, floor, RULE)
        w = _moved(w, g, moves[:, None], m[:, None], p[:, None], RULE)
        tl.store(grad_norm + row, length.to(tl.float32), mask=there)
        tl.store(finite + row, (length < float("inf")).to(tl.uint8), mask=there)
    if BALL and L2:
        length = tl.sqrt(_measure(w, L2, 1))
        over = _outside(length, limit)
        if out.dtype.element_ty != tl.float32:  # noqa: SIM102 - a cast may carry those between the two out of their ball
            if tl.max(((length > safe) & (length <= limit)).to(tl.int32), 0) != 0:
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
def _block(row, block, mask, size, each, COVER: tl.constexpr, BLOCK: tl.constexpr):
    """The position of a block in a row."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    return row * size + column, inside, _real(mask, row, column, inside, each, COVER)


@triton.jit
def sums_kernel(
    delta, grad, mask, sums, size, each, blocks,
    L2: tl.constexpr, RULE: tl.constexpr, SLOTS: tl.constexpr, COVER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's measure of g and, with four slots, ||d||^2, <d, h> and ||h||^2."""
    program = tl.program_id(0).to(tl.int64)
    offset, _inside, real = _block(program // blocks, program % blocks, mask, size, each, COVER, BLOCK)
    sums += program * SLOTS
    d, g = _both(delta if SLOTS == 4 else None, grad, offset, real)
    if grad is not None:
        tl.store(sums, _measure(g, L2, 0))
    if SLOTS == 4:
        tl.store(sums + 1, _measure(d, True, 0))
        if grad is not None:
            h = _direction(g, RULE)
            tl.store(sums + 2, tl.sum(d.to(tl.float64) * h.to(tl.float64), 0))
            tl.store(sums + 3, _measure(h, True, 0))


@triton.jit
def verdict_kernel(
    delta, grad, mask, out, sums, verdicts, again, size, each, blocks, parts, share,
    step: tl.float64, floor: tl.float64, limit: tl.float64, safe: tl.float64, trusted: tl.float64,
    RULE: tl.constexpr, COVER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row's pace, its length after the move as far as sums can tell, and whether that is in doubt.

    For a row in doubt the sums of squares of every moved block, before and after the cast; its `share` programs take turns.
    """
    program = tl.program_id(0).to(tl.int64)
    row, first = program // share, program % share
    moves, m, p = False, 0.0, 0.0
    square = _joined(sums, row, parts, 1, 4, True, PARTS)
    longest = tl.sqrt(square)
    if grad is not None:
        moves, m, p = _pace(_length(_joined(sums, row, parts, 0, 4, True, PARTS), True), step, floor, RULE)
        a = tl.cast(m, tl.float64) * tl.cast(p, tl.float64)
        dh = _joined(sums, row, parts, 2, 4, True, PARTS)
        hh = _joined(sums, row, parts, 3, 4, True, PARTS)
        square += tl.where(moves, a * (2.0 * dh + a * hh), 0.0)
        longest += tl.where(moves, tl.abs(a) * tl.sqrt(hh), 0.0)
    length = tl.sqrt(square)
    known = (square >= trusted * (longest * longest)) & ((length > limit) | (length <= safe))
    if first == 0:
        verdict = verdicts + row * 4
        tl.store(verdict, tl.cast(m, tl.float64))
        tl.store(verdict + 1, tl.where(moves, p, 0.0).to(tl.float64))
        tl.store(verdict + 2, length)
        tl.store(verdict + 3, tl.where(known, 0.0, 1.0).to(tl.float64))
    if known == 0:
        for block in range(first, blocks, share):
            offset, _inside, real = _block(row, block, mask, size, each, COVER, BLOCK)
            w = _read(delta, offset, real)
            if grad is not None:
                w = _moved(w, _read(grad, offset, real), moves, m, p, RULE)
            part = again + (row * blocks + block) * 2
            tl.store(part, _measure(w, True, 0))
            tl.store(part + 1, _measure(w.to(out.dtype.element_ty).to(tl.float32), True, 0))


@triton.jit
def apply_kernel(
    delta, grad, x, mask, out, sums, verdicts, again, stored, size, each, blocks, parts,
    step: tl.float64, floor: tl.float64, limit: tl.float64, target: tl.float64, bound, low, high,
    L2: tl.constexpr, RULE: tl.constexpr, BALL: tl.constexpr,
    COVER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Backwards, because the entries summed last are still in the cache.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row = program // blocks
    offset, inside, real = _block(row, program % blocks, mask, size, each, COVER, BLOCK)
    w, g = _both(delta, grad, offset, real)
    if verdicts is not None:
        verdict = verdicts + row * 4
        m, p = tl.load(verdict).to(tl.float32), tl.load(verdict + 1).to(tl.float32)
        moves, length, doubtful = p != 0, tl.load(verdict + 2), tl.load(verdict + 3) != 0
    elif grad is not None:
        moves, m, p = _pace(_length(_joined(sums, row, parts, 0, 1, L2, PARTS), L2), step, floor, RULE)
    if grad is not None:
        w = _moved(w, g, moves, m, p, RULE)
    if BALL and L2:
        over = _outside(length, limit)
        if doubtful:
            length = tl.sqrt(_joined(again, row, parts, 0, 2, True, PARTS))
            cast = tl.sqrt(_joined(again, row, parts, 1, 2, True, PARTS))
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
def norms_kernel(
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
