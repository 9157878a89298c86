"""The divergences of two predictions and their gradients, row block by row block.

Written out in tensors, a symmetric divergence and its gradients hold a dozen tensors of the logits' size, and read and
write memory as often. Here each block of rows goes through the whole computation, forward and backward, before the next
block, so only the requested gradients take memory of that size. The backward keeps only the logits and computes a
block's probabilities again. It multiplies by the incoming cotangent before the cast to the logits' dtype, so that a
loss scale keeps small fp16 gradients from vanishing. Small logits, second derivatives and compiled code use the
expression written out.

With p, q the probabilities of logits a, b, and E_p the mean under p (softmax head):

    KL(p‖q) = E_p[log p − log q],   ∂/∂a = p ∘ (a − b − E_p[a − b]),   ∂/∂b = q − p

and for the sigmoid head, a Bernoulli variable per class, ∂/∂a = p ∘ (1 − p) ∘ (a − b), ∂/∂b = q − p. The symmetric
divergence is the sum of both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Head = Literal["softmax", "sigmoid"]
Direction = Literal["clean||perturbed", "perturbed||clean"]
Kind = Direction | Literal["symmetric"]

# Bytes of one side's block, in the dtype computed in; about five of them live at one time. For rows of 28,996 on two CPU
# cores of 1 MB of second-level cache each and 32 MB of third, twice as much was as good, half and fourfold cost a sixth to
# a quarter more, and no blocks at all three times as much. A GPU wants few launches, and temporaries of a bounded size.
CPU_BLOCK_PER_THREAD = 2**20
DEVICE_BLOCK = 2**26

# Up to so many bytes of one side the expression written out is the faster, for it takes half as many operations.
SMALL = 2**20

# Gaps a − b are formed at this scale, a power of two for exactness, so that for finite logits neither the gaps nor
# their distances from a mean overflow: inf times a probability of 0 is NaN.
SHRINK = 1 / 8


def divergences(clean: Tensor, perturbed: Tensor, mask: Tensor | None = None, *, kind: Kind, head: Head) -> Tensor:
    """The divergence of each row, in fp32 (fp64 for fp64).

    Arguments:
        clean, perturbed: logits, `(..., C)`.
        mask: the rows that count, `(...)`; the others may hold anything, and are 0 with a gradient of 0.
        kind: `"clean||perturbed"` is KL(clean‖perturbed); `"symmetric"` the sum of both directions.
        head: `"softmax"` over the last axis, or `"sigmoid"`: one Bernoulli variable per class, summed over classes.
    """
    small = clean.numel() * _wide(clean, perturbed).itemsize <= SMALL
    if torch.compiler.is_compiling() or small:  # a compiler fuses and blocks by itself
        return _written_out(clean, perturbed, mask, kind, head)
    rows: Tensor = _Divergences.apply(clean, perturbed, mask, kind, head)  # type: ignore[no-untyped-call]
    return rows


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(clean: Tensor, perturbed: Tensor, mask: Tensor | None, kind: Kind, head: Head) -> Tensor:
        compute = _softmax_rows if head == "softmax" else _sigmoid_rows
        rows = torch.zeros(clean.shape[:-1].numel(), dtype=_wide(clean, perturbed), device=clean.device)
        for block, a, b in _blocks(clean, perturbed, mask):
            rows[block] = compute(a, b, kind)
        return rows.view(clean.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.kind, ctx.head = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        wanted = ctx.needs_input_grad[:2]
        into = _Gradients.apply(cotangent, *ctx.saved_tensors, ctx.kind, ctx.head, wanted)  # type: ignore[no-untyped-call]
        return *into, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        rows: Tensor = _Divergences.apply(*_batched(info, in_dims, inputs))  # type: ignore[no-untyped-call]
        return rows, 0


class _Gradients(torch.autograd.Function):
    """The requested gradients to both sides; a separate function, so that they can be differentiated again."""

    @staticmethod
    def forward(
        cotangent: Tensor,
        clean: Tensor,
        perturbed: Tensor,
        mask: Tensor | None,
        kind: Kind,
        head: Head,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        slope = _softmax_slope if head == "softmax" else _sigmoid_slope
        forward, backward = kind != "perturbed||clean", kind != "clean||perturbed"
        into_clean, into_perturbed = (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) if want else None
            for x, want in zip((clean, perturbed), wanted, strict=True)
        )
        if mask is not None:
            cotangent = torch.where(mask.bool(), cotangent, 0)
        cotangent = cotangent.reshape(-1, 1)
        times = {True: cotangent / SHRINK, False: cotangent}
        for block, a, b in _blocks(clean, perturbed, mask):
            gap = _shrunk_gap(a, b) if head == "softmax" else (a * SHRINK).sub_(b, alpha=SHRINK)
            x, y = (a.softmax(-1), b.softmax(-1)) if head == "softmax" else (a, b)
            if into_clean is not None:
                _put(into_clean, block, slope(x, y, gap, forward, backward).mul_(times[forward][block]))
            if into_perturbed is not None:
                _put(into_perturbed, block, slope(y, x, gap.neg_(), backward, forward).mul_(times[backward][block]))
        return into_clean, into_perturbed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, Tensor | None]) -> None:
        *tensors, ctx.kind, ctx.head, ctx.wanted = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *into: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangent, clean, perturbed, mask = ctx.saved_tensors

        def gradients(cotangent: Tensor, clean: Tensor, perturbed: Tensor) -> list[Tensor]:
            rows = partial(_written_out, mask=mask, kind=ctx.kind, head=ctx.head)
            return wanted(torch.func.vjp(rows, clean, perturbed)[1](cotangent))

        def wanted(sides: tuple[Any, ...]) -> list[Tensor]:
            return [x for x, want in zip(sides, ctx.wanted, strict=True) if want]

        pull = torch.func.vjp(gradients, cotangent, clean, perturbed)[1]
        return *pull(wanted(into)), None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
        into = _Gradients.apply(*_batched(info, in_dims, inputs))  # type: ignore[no-untyped-call]
        return into, tuple(None if x is None else 0 for x in into)


def _batched(info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs with vmap's axis in front, as one more leading axis, since rows do not depend on each other."""
    return [
        x if not isinstance(x, Tensor) else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims, strict=True)
    ]


def _written_out(clean: Tensor, perturbed: Tensor, mask: Tensor | None, kind: Kind, head: Head) -> Tensor:
    """The rows' divergences as one expression of whole tensors, for autograd or a compiler to differentiate."""
    wide = _wide(clean, perturbed)
    if mask is not None:
        clean, perturbed = (torch.where(mask.bool()[..., None], x, 0) for x in (clean, perturbed))
    a, b = clean.to(wide), perturbed.to(wide)
    if head == "softmax":  # a row whose logits lie further apart than the dtype reaches comes out as NaN or inf
        return _terms(a.log_softmax(-1), b.log_softmax(-1), kind).sum(-1)
    on, off = (_terms(F.logsigmoid(x), F.logsigmoid(y), kind) for x, y in ((a, b), (-a, -b)))
    return (on + off).sum(-1)


def _terms(log_p: Tensor, log_q: Tensor, kind: Kind) -> Tensor:
    gap = log_p - log_q
    if kind == "symmetric":
        return (log_p.exp() - log_q.exp()) * gap
    return log_p.exp() * gap if kind == "clean||perturbed" else -log_q.exp() * gap


def _wide(clean: Tensor, perturbed: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(clean.dtype, perturbed.dtype), torch.float32)


def _blocks(clean: Tensor, perturbed: Tensor, mask: Tensor | None) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """The selected rows, numbered over all leading axes, and the wide logits of both sides there; not to be written to."""
    if not clean.numel():
        return
    wide, classes = _wide(clean, perturbed), clean.shape[-1]
    clean, perturbed = clean.reshape(-1, classes), perturbed.reshape(-1, classes)
    counts = None if mask is None else mask.reshape(-1).bool()
    size = _rows_at_once(clean, wide.itemsize)
    blocks: Sequence[slice | Tensor] = [slice(start, start + size) for start in range(0, len(clean), size)]
    if counts is not None and _readable(counts):
        chosen = counts.nonzero().squeeze(1)
        blocks = torch.split(chosen, size) if len(chosen) < len(clean) else blocks
        counts = None
    for block in blocks:
        a, b = (x[block] if isinstance(block, slice) else x.index_select(0, block) for x in (clean, perturbed))
        a, b = a.to(wide), b.to(wide)
        if counts is not None:
            a, b = (torch.where(counts[block, None], x, 0) for x in (a, b))
        yield block, a, b


def _put(into: Tensor, block: slice | Tensor, values: Tensor) -> None:
    rows = into.view(-1, into.shape[-1])
    if isinstance(block, slice):
        rows[block] = values
    else:
        rows.index_copy_(0, block, values.to(into.dtype))


def _readable(counts: Tensor) -> bool:
    """True if the host can read the value without waiting for a device."""
    return counts.is_cpu


def _rows_at_once(logits: Tensor, itemsize: int) -> int:
    bound = CPU_BLOCK_PER_THREAD * torch.get_num_threads() if logits.is_cpu else DEVICE_BLOCK
    return max(1, bound // (logits.shape[-1] * itemsize))


def _softmax_rows(a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    p, q = a.softmax(-1), b.softmax(-1)
    # log p − log q; log p = a − max a + log max p spares an exponential
    gap = _shrunk_gap(a, b).add_(p.amax(-1, keepdim=True).log() - q.amax(-1, keepdim=True).log(), alpha=SHRINK)
    weight = p.sub_(q) if kind == "symmetric" else p if kind == "clean||perturbed" else q
    rows = weight.mul_(gap).sum(-1).div_(SHRINK)
    return rows.neg_() if kind == "perturbed||clean" else rows


def _shrunk_gap(a: Tensor, b: Tensor) -> Tensor:
    """a − b minus a number per row, times SHRINK; each side's maximum is subtracted first, to keep precision."""
    a, b = (torch.add(x.amax(-1, keepdim=True).mul_(-SHRINK), x, alpha=SHRINK) for x in (a, b))
    return a.sub_(b)


def _sigmoid_rows(a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    if kind == "symmetric":  # (p − q)(log p − log q) of both outcomes share p − q, and their logarithms differ by a − b
        return _sigmoid_difference(a, b).mul_(a - b).sum(-1)
    if kind == "perturbed||clean":
        a, b = b, a
    on = (F.logsigmoid(a) - F.logsigmoid(b)).mul_(a.sigmoid())
    off = (F.logsigmoid(-a) - F.logsigmoid(-b)).mul_((-a).sigmoid())
    return on.add_(off).sum(-1)


def _sigmoid_difference(a: Tensor, b: Tensor) -> Tensor:
    """σ(a) − σ(b), from the complements where both are near 1."""
    return torch.where(a > 0, (-b).sigmoid() - (-a).sigmoid(), a.sigmoid() - b.sigmoid())


def _softmax_slope(p: Tensor, q: Tensor, gap: Tensor, first: bool, second: bool) -> Tensor:
    """The gradient to a of first·KL(p‖q) + second·KL(q‖p), times SHRINK if first, from p, q and the shrunk gap."""
    if not first:
        return p - q
    slope = p * gap
    mean = slope.sum(-1, keepdim=True)
    if second:
        return torch.sub(gap, mean - SHRINK, out=slope).mul_(p).sub_(q, alpha=SHRINK)
    return torch.sub(gap, mean, out=slope).mul_(p)


def _sigmoid_slope(a: Tensor, b: Tensor, gap: Tensor, first: bool, second: bool) -> Tensor:
    """The gradient to a of first·KL(p‖q) + second·KL(q‖p), times SHRINK if first, from the logits and the shrunk gap."""
    if not first:
        return _sigmoid_difference(a, b)
    slope = a.sigmoid().mul_((-a).sigmoid()).mul_(gap)
    return slope.add_(_sigmoid_difference(a, b), alpha=SHRINK) if second else slope
