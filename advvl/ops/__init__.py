"""The arithmetic on perturbations: norms, projection, and the fused ascent step.

One signature, one choice of back end. `_reference.py` is the definition; a faster back end has the same functions
with the same arguments and is held to it by the tests.

Shapes: a perturbation is `(B, ...)`, or `(N, ...)` packed, with `segments` `(N,)` giving the sample of each of its rows.
A *row* is what one norm is taken over: all of a sample's entries (`per="sample"`), or the last axis of one position
(`per="token"`). `mask` covers the leading axes of the perturbation, `(B, T)` for `(B, T, D)`; True is a real position.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from advvl.errors import ConfigurationError, ShapeError
from advvl.ops import _reference
from advvl.ops._types import Backend, Box, Norm, Per, Rule, Stepped

__all__ = ["Backend", "Box", "Norm", "Per", "Rule", "Stepped", "norms", "project", "step_and_project"]

_BACKENDS: dict[str, ModuleType] = {"reference": _reference}


@torch.no_grad()
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
    x: Tensor | None = None,
    box: Box | None = None,
    floor: float = 0.0,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Stepped:
    """Step along the gradient, back into the ball, then into the box; masked positions end at exactly zero.

    `rule="normalised"` moves by `step_size * grad / max(norm of grad, floor)`, `rule="sign"` by `step_size * sign(grad)`.
    A row whose gradient is zero or not finite does not move. `box=(low, high)` bounds `x + delta`, given `x` inside it; an
    entry of `x` outside it moves towards it by no more than it had moved at all, so that the ball wins.
    Computed in fp32 at least, stored in the dtype of `delta`, inside the ball in that dtype. Source: specification of
    VILLA's and FreeLB's update (step, then projection), defined at zero where the published form is not.

    Raises:
        ShapeError: the gradient, mask, segments or `x` do not fit the perturbation.
        ConfigurationError: the back end is unknown, or a box comes without `x`.
    """
    _check(delta, per=per, mask=mask, segments=segments, x=x, box=box)
    if grad.shape != delta.shape:
        raise ShapeError(f"expected a gradient of shape {tuple(delta.shape)}, got {tuple(grad.shape)}")
    stepped: Stepped = _choose(backend).step_and_project(
        delta, grad, step_size, radius, norm, rule, per, mask, segments, x, box, floor
    )
    return stepped._replace(delta=delta.copy_(stepped.delta)) if inplace else stepped


@torch.no_grad()
def project(
    delta: Tensor,
    *,
    radius: float,
    norm: Norm = "l2",
    per: Per = "sample",
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    x: Tensor | None = None,
    box: Box | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The perturbation brought back into the ball and the box, unchanged where it is inside already.

    No entry grows: where `x` itself is outside the box, its entry turns towards the box, and the ball wins.

    Raises:
        ShapeError: the mask, segments or `x` do not fit the perturbation.
        ConfigurationError: the back end is unknown, or a box comes without `x`.
    """
    _check(delta, per=per, mask=mask, segments=segments, x=x, box=box)
    projected: Tensor = _choose(backend).project(delta, radius, norm, per, mask, segments, x, box)
    return projected


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
        ConfigurationError: the back end is unknown.
    """
    _check(delta, per=per, mask=mask, segments=segments, x=None, box=None)
    values: Tensor = _choose(backend).norms(delta, norm, per, mask, segments)
    return values


def _choose(backend: str) -> ModuleType:
    if backend == "auto":
        return _reference
    if backend not in _BACKENDS:
        raise ConfigurationError(f"expected a back end among {['auto', *_BACKENDS]}, got {backend!r}")
    return _BACKENDS[backend]


def _check(
    delta: Tensor, *, per: Per, mask: Tensor | None, segments: Tensor | None, x: Tensor | None, box: Box | None
) -> None:
    shape = tuple(delta.shape)
    if not delta.is_floating_point():
        raise ShapeError(f"expected a floating-point perturbation, got {delta.dtype}")
    if delta.ndim < 2:
        raise ShapeError(f"expected a perturbation of two axes or more, samples first, got {shape}")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape[: mask.ndim]):
        raise ShapeError(
            f"expected a boolean mask over the leading axes of {shape}, got {mask.dtype} of {tuple(mask.shape)}; "
            "give one entry a position"
        )
    if segments is not None and tuple(segments.shape) != shape[:1]:
        raise ShapeError(f"expected segments of shape {shape[:1]}, got {tuple(segments.shape)}")
    if box is not None and x is None:
        raise ConfigurationError("expected x beside a box, got None; the box bounds x + delta")
    if x is not None and x.shape != delta.shape:
        raise ShapeError(f"expected x of shape {shape}, got {tuple(x.shape)}")
