"""The Triton back end: CUDA tensors in fp32, fp16 and bf16; on a CPU only through Triton's interpreter, for tests.

A row of up to 16,384 entries is handled by one program: it reads d and g once into registers, computes everything from
there, and writes the new row once. Short rows share a program. Longer rows are cut into blocks so that a few of them
fill the chip: one launch sums every block, one judges the rows if there is an L2 ball, one applies the step, and one
joins the norms. Every perturbation of a call has separate launches: one per step in the first case, three or four in
the second and, for packed samples, torch's own launches that gather their sums. None waits for the host, so all can be
captured in a graph. `_kernels` has the computation and its proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from advvl.ops import _reference
from advvl.ops._kernels import apply_kernel, norms_kernel, rows_kernel, sums_kernel, verdict_kernel
from advvl.ops._reference import not_above
from advvl.ops._types import Move, Region, Rows, Rule, Stepped

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LONGEST = 16_384  # entries of the longest row that one program holds, beside its gradient, in registers
_TILE = 1024  # entries of a program of several short rows
_BLOCK = 4096  # entries of a block of a long row; up to four times that once a row has more than _BLOCKS of them
_BLOCKS = 128
_WAVE = 512  # about as many programs judge rows, at least one per row: as many as a large GPU runs at once
_TRUSTED = 0.25  # of (||d|| + a||h||)^2: where the algebra gives the norm; see `_kernels`
_NEVER = 2.0
# Whether multiply and add may be fused. Not where rows are moved: they are rounded as under the interpreter, and a long one
# in doubt, moved to be measured and again to be stored, comes out the same. Sums lose nothing, and take half the registers.
_SUMS, _MOVES = {"enable_fp_fusion": True}, {"enable_fp_fusion": False}

_INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)


class _Job(NamedTuple):
    """The work on one perturbation: contiguous tensors, tensors for the results (None: not needed), and the options."""

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
    """The numbers that the kernels compare and scale with; see `_kernels`."""

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
    if rows.unit is not None:
        return "its rows have units of their own, and the kernels take one radius and step size"
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
    with torch.cuda.device_of(delta):  # type: ignore[no-untyped-call]
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
    rows_kernel[(_ratio(rows, together),)](
        job.delta, job.grad, x, mask, job.out, job.grad_norm, _bytes(job.finite), job.delta_norm,
        rows, size, each,
        float(job.step_size), float(job.floor), ball.limit, ball.safe, ball.target, ball.bound, low, high,
        L2=job.rows.norm == "l2", RULE=job.rule, BALL=math.isfinite(job.region.radius),
        COVER=cover, ROWS=together, SIZE=width, num_warps=_warps(together * width), **_MOVES,
    )  # fmt: skip


def _run_blocks(job: _Job, size: int, segments: Tensor | None) -> None:
    delta, grad, l2 = job.delta, job.grad, job.rows.norm == "l2"
    within = math.isfinite(job.region.radius)
    rows = delta.numel() // size
    ball = _ball(job.region.radius, delta.dtype, size if segments is None else delta.numel(), grad is not None)
    mask, each, cover = _masked(job, size)
    width = min(max(_BLOCK, _power_of_2(_ratio(size, _BLOCKS))), 4 * _BLOCK)
    width = min(width, _power_of_2(size))  # packed rows may be short
    blocks = _ratio(size, width)
    grid, warps = (rows * blocks,), _warps(width)
    slots = 4 if l2 and within else 1
    parts = blocks if segments is None else 1
    joins = _power_of_2(parts)

    def empty(count: int) -> Tensor:
        return torch.empty(rows, blocks, count, dtype=torch.float64, device=delta.device)

    sums, samples, verdicts, again, stored = None, None, None, None, None
    if grad is not None or slots == 4:
        sums = empty(slots)
        sums_kernel[grid](
            delta, grad, mask, sums, size, each, blocks,
            L2=l2, RULE=job.rule, SLOTS=slots, COVER=cover, BLOCK=width, num_warps=warps, **_SUMS,
        )  # fmt: skip
        sums, samples = _gathered(sums, segments, l2)
    judged = float(job.step_size), float(job.floor), ball.limit
    if slots == 4:
        verdicts, again = torch.empty(rows, 4, dtype=torch.float64, device=delta.device), empty(2)
        share = min(blocks, _ratio(_WAVE, rows))
        verdict_kernel[(rows * share,)](
            delta, grad, mask, job.out, sums, verdicts, again, size, each, blocks, parts, share,
            *judged, ball.safe, ball.trusted,
            RULE=job.rule, COVER=cover, BLOCK=width, PARTS=joins, num_warps=warps, **_MOVES,
        )  # fmt: skip
        again, _ = _gathered(again, segments, l2)
    if job.out is None:
        stored = empty(1)
        sums_kernel[grid](
            None, delta, mask, stored, size, each, blocks,
            L2=l2, RULE="normalised", SLOTS=1, COVER=cover, BLOCK=width, num_warps=warps, **_SUMS,
        )  # fmt: skip
    else:
        stored = empty(1) if job.delta_norm is not None else None
        low, high, x = _boxed(job)
        apply_kernel[grid](
            delta, grad, x, mask, job.out, sums, verdicts, again, stored, size, each, blocks, parts, *judged,
            ball.target, ball.bound, low, high,
            L2=l2, RULE=job.rule, BALL=within, COVER=cover, BLOCK=width, PARTS=joins, num_warps=warps, **_MOVES,
        )  # fmt: skip
    if stored is not None:
        _, stored = _gathered(stored, segments, l2)
        norms_kernel[(rows,)](
            None if grad is None else samples, stored, job.grad_norm, _bytes(job.finite), job.delta_norm, parts,
            L2=l2, SLOTS=slots, PARTS=joins, num_warps=1, **_SUMS,
        )  # fmt: skip


def _gathered(parts: Tensor, segments: Tensor | None, l2: bool) -> tuple[Tensor, Tensor]:
    """Measures of the parts of every row `(rows, parts, slots)`: those that a row needs, and those of a sample.

    If rows are packed, a row needs the measures of its whole sample.
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
    """The mask, and its layout over rows of this size; see `_real`."""
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


# Triton's own two can be called in kernels too, and take longer than all other work on the host.
def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _ratio(whole: int, part: int) -> int:
    """Rounded up."""
    return -(-whole // part)


def _warps(entries: int) -> int:
    """Sixteen entries per thread (32 in the longest rows): enough loads of 16 bytes in flight, few enough registers."""
    return min(max(entries // 512, 1), 16)
