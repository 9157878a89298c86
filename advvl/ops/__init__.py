"""The arithmetic on perturbations: norms, projection, and the fused ascent step.

There is one signature with three back ends: `reference` is the definition, plain PyTorch on any device; `cpu` works on
blocks of rows that fit the cache; `triton` is a kernel for CUDA. `auto` takes the fastest that supports the case and,
while a graph is being compiled, the reference, which the compiler fuses itself. The tests compare the others with the
reference.

Shapes: a perturbation is `(B, ...)`, or `(N, ...)` packed, with `segments` `(N,)` giving the sample of each of its
rows. A *row* holds the entries of one norm: all entries of a sample (`per="sample"`), or the last axis of one position
(`per="token"`). `mask` covers the leading axes of the perturbation, `(B, T)` for `(B, T, D)`; True is a real position.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from advvl.checks import is_choice
from advvl.errors import ConfigurationError, ShapeError
from advvl.ops import _cpu, _reference
from advvl.ops._types import Backend, Box, Implementation, Move, Norm, Per, Region, Rows, Rule, Stepped

__all__ = [
    "Backend",
    "Box",
    "Move",
    "Norm",
    "Per",
    "Region",
    "Rows",
    "Rule",
    "Stepped",
    "move",
    "norms",
    "project",
    "step_and_project",
]

_NORMS, _PERS, _RULES = get_args(Norm), get_args(Per), get_args(Rule)  # once, to keep a step cheap


@torch.no_grad()
def move(moves: Sequence[Move], *, inplace: bool = False, backend: Backend = "auto") -> list[Stepped]:
    """Take the ascent step of several perturbations, those of all modalities, in one call; see `step_and_project`.

    Raises:
        ShapeError: a gradient, mask, segments or `x` do not fit their perturbation; a perturbation to be changed in
            place overlaps itself in memory.
        ConfigurationError: the back end is unknown or does not support one of them, a norm, rule or granularity is
            unknown, a number is out of its range, or a box comes without `x`.
    """
    for one in moves:
        _check(one.delta, one.rows, one.region)
        if not (math.isfinite(one.step_size) and 0 <= one.floor < math.inf):
            raise ConfigurationError(
                f"expected a finite step_size and a finite floor of 0 or more, got {one.step_size!r} and {one.floor!r}"
            )
        _check_choice("rule", one.rule, _RULES)
        if one.grad.shape != one.delta.shape:
            raise ShapeError(f"expected a gradient of shape {tuple(one.delta.shape)}, got {tuple(one.grad.shape)}")
        if inplace and _overlaps(one.delta):
            raise ShapeError(
                "expected a perturbation that owns each of its entries, got shape "
                f"{tuple(one.delta.shape)} and strides {one.delta.stride()}; make it contiguous, or inplace=False"
            )
    return _choose(backend, [(one.delta, one.rows) for one in moves]).move(moves, inplace=inplace)


def step_and_project(
    delta: Tensor,
    grad: Tensor,
    *,
    step_size: float,
    radius: float = math.inf,
    norm: Norm = "l2",
    rule: Rule = "normalised",
    per: Per = "sample",
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    unit: Tensor | None = None,
    x: Tensor | None = None,
    box: Box | None = None,
    floor: float = 0.0,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Stepped:
    """Step along the gradient, back into the ball, then into the box; masked positions end at exactly zero.

    `rule="normalised"` moves by `step_size * grad / max(norm of grad, floor)`, `"sign"` by `step_size * sign(grad)`,
    `"plain"` by `step_size * grad`, which may lead anywhere: a step of 2**126 or more is not taken (fp64: 2**1022). A
    row whose gradient is zero or not finite does not move. With `unit`, each row has a length by which its step size
    and radius are multiplied. `box=(low, high)` bounds `x + delta`, given `x` inside it; where `x` itself is outside,
    that entry of delta turns towards the box without growing, so the ball takes precedence. Computed in fp32 at least,
    stored in the dtype of `delta`, inside the ball in that dtype. Source: specification of VILLA's and FreeLB's update
    (step, then projection), defined at zero where the published form is not.

    Raises:
        ShapeError: the gradient, mask, segments, unit or `x` do not fit the perturbation; `inplace` and a perturbation that
            shares its memory with itself (an expanded one).
        ConfigurationError: the back end is unknown or cannot do this, a number is out of its range, or a box comes
            without `x`.
    """
    rows = Rows(norm=norm, per=per, mask=mask, segments=segments, unit=unit)
    region = Region(radius=radius, box=box, x=x)
    one = Move(delta=delta, grad=grad, step_size=step_size, rows=rows, region=region, rule=rule, floor=floor)
    return move([one], inplace=inplace, backend=backend)[0]


@torch.no_grad()
def project(
    delta: Tensor,
    *,
    radius: float,
    norm: Norm = "l2",
    per: Per = "sample",
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    unit: Tensor | None = None,
    x: Tensor | None = None,
    box: Box | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The perturbation projected into the ball and the box, unchanged if it is already inside.

    No entry grows: where `x` itself is outside the box, its entry turns towards the box, and the ball takes precedence.

    Raises:
        ShapeError: the mask, segments, unit or `x` do not fit the perturbation.
        ConfigurationError: the back end is unknown or cannot do this, a number is out of its range, or a box comes
            without `x`.
    """
    rows = Rows(norm=norm, per=per, mask=mask, segments=segments, unit=unit)
    region = Region(radius=radius, box=box, x=x)
    _check(delta, rows, region)
    return _choose(backend, [(delta, rows)]).project(delta, rows, region)


@torch.no_grad()
def norms(
    delta: Tensor,
    *,
    norm: Norm = "l2",
    per: Per = "sample",
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The norm of every row, in fp32 at least; shapes as in `Stepped`.

    Raises:
        ShapeError: the mask or segments do not fit the perturbation.
        ConfigurationError: the back end is unknown or cannot do this.
    """
    rows = Rows(norm=norm, per=per, mask=mask, segments=segments)
    _check(delta, rows, Region())
    return _choose(backend, [(delta, rows)]).norms(delta, rows)


def _choose(backend: str, work: Sequence[tuple[Tensor, Rows]]) -> Implementation:
    """The back end of this name, or the fastest that supports all of this work."""
    if backend == "auto":
        if torch.compiler.is_compiling():
            return _reference
        fast = "triton" if any(delta.is_cuda for delta, _ in work) else "cpu"
        return _reference if _refusal(fast, work) else _BACKENDS[fast]()
    if backend not in _BACKENDS:
        raise ConfigurationError(f"expected a back end among {list(get_args(Backend))}, got {backend!r}")
    reason = _refusal(backend, work)
    if reason:
        able = [name for name in _BACKENDS if not _refusal(name, work)]
        raise ConfigurationError(f"expected a back end that can do this, got {backend!r}: {reason}; available: {able}")
    return _BACKENDS[backend]()


def _refusal(backend: str, work: Sequence[tuple[Tensor, Rows]]) -> str | None:
    if backend == "triton" and not _triton_installed():
        return "triton is not installed (it comes with the CUDA builds of torch)"
    implementation = _BACKENDS[backend]()
    return next((reason for delta, rows in work if (reason := implementation.refusal(delta, rows))), None)


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _load_triton() -> Implementation:
    from advvl.ops import _triton  # here: it imports triton, which takes a while

    return _triton


_BACKENDS: Mapping[str, Callable[[], Implementation]] = {
    "reference": lambda: _reference,
    "cpu": lambda: _cpu,
    "triton": _load_triton,
}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not is_choice(value, choices):
        raise ConfigurationError(f"expected {name} to be one of {choices}, got {value!r}")


def _check(delta: Tensor, rows: Rows, region: Region) -> None:
    shape, mask, segments, x = tuple(delta.shape), rows.mask, rows.segments, region.x
    _check_choice("norm", rows.norm, _NORMS)
    _check_choice("per", rows.per, _PERS)
    if not delta.is_floating_point():
        raise ShapeError(f"expected a floating-point perturbation, got {delta.dtype}")
    if delta.ndim < 2:
        raise ShapeError(f"expected a perturbation of two axes or more, samples first, got {shape}")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape[: mask.ndim]):
        raise ShapeError(
            f"expected a boolean mask over the leading axes of {shape}, got {mask.dtype} of {tuple(mask.shape)}; "
            "give one entry per position, by mask.bool()"
        )
    if segments is not None and tuple(segments.shape) != shape[:1]:
        raise ShapeError(f"expected segments of shape {shape[:1]}, got {tuple(segments.shape)}")
    if rows.unit is not None and tuple(rows.unit.shape) != (shape[:-1] if rows.per == "token" else shape[:1]):
        raise ShapeError(f"expected a unit for each row of {shape} per {rows.per}, got {tuple(rows.unit.shape)}")
    if not region.radius >= 0:
        raise ConfigurationError(f"expected a radius of 0 or more, math.inf for none, got {region.radius!r}")
    if region.box is not None and not region.box[0] <= region.box[1]:
        raise ConfigurationError(f"expected a box as (low, high), got {region.box!r}")
    if region.box is not None and x is None:
        raise ConfigurationError("expected x beside a box, got None; the box bounds x + delta")
    if x is not None and x.shape != delta.shape:
        raise ShapeError(f"expected x of shape {shape}, got {tuple(x.shape)}")


def _overlaps(delta: Tensor) -> bool:
    """True if two entries share one place in memory, or might, because an axis steps within the span of smaller ones."""
    span = 1
    if delta.is_contiguous() or delta.numel() == 0:
        return False
    for stride, size in sorted(zip(delta.stride(), delta.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride
    return False
