"""Loss scales of moves in fp16, where the gradients of small losses underflow and their rows would not move.

Rows do not depend on each other in a backward, so each keeps the gradient of a scale that suits it. So neither the
batch size nor the reduction of the loss decides which rows move. Losses are computed in fp32, as under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from advvl.adapters.diagnosis import is_compiled
from advvl.perturbers.places import Place

Differentiate = Callable[[float], Sequence[Tensor | None]]

_FIRST, _STEP, _LEAST, _MOST = 2.0**15, 2.0**12, 2.0**-21, 2.0**87
_FAINT = 2.0**-6  # if a row's largest entry is below this, digits are lost in fp16


def wide_losses(model: nn.Module) -> AbstractContextManager[object]:
    """Make torch's loss functions compute in fp32 inside this context, for a model in fp16; not in compiled modules."""
    return nullcontext() if any(map(is_compiled, model.modules())) else _WideLosses()


class _WideLosses(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_LOSSES = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.multi_margin_loss,
    F.nll_loss,
    F.smooth_l1_loss,
}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def scaled(differentiate: Differentiate, places: Mapping[str, Place], *, most: float = _MOST) -> list[Tensor | None]:
    """The gradients, each row's from a scale at which it neither overflows nor underflows; reads from the device.

    Arguments:
        differentiate: gives the gradient at each place, multiplied by a scale; may be called several times.
        most: the largest scale that the loss's own dtype holds.
    """
    found = [_Rows.of(g, place, _FIRST) for g, place in zip(differentiate(_FIRST), places.values(), strict=True)]
    for factor in (_STEP, 1 / _STEP):  # up for rows with tiny gradients, down for rows that are not finite
        scale = _FIRST * factor
        while _LEAST <= scale <= most and any(rows.wanting(up=factor > 1) for rows in found):
            again = zip(found, differentiate(scale), places.values(), strict=True)
            found = [rows.improved(_Rows.of(g, place, scale), up=factor > 1) for rows, g, place in again]
            scale *= factor
    return [rows.gradient for rows in found]


def scaled_whole(differentiate: Differentiate, count: int, *, most: float) -> list[Tensor | None]:
    """The gradients of tensors of any shape, in fp32 at least, each as one row of `scaled`; reads from the device.

    Arguments:
        differentiate, most: as of `scaled`.
        count: the number of tensors.
    """

    def as_rows(scale: float) -> list[Tensor | None]:
        found = differentiate(scale)
        return [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)).unsqueeze(0) for g in found]

    place = Place(torch.empty(0))
    # few scales: many weights have a zero gradient, and each scale costs a backward
    most = min(most, _FIRST * _STEP**2)
    found = scaled(as_rows, {str(n): place for n in range(count)}, most=most)
    return [None if g is None else g.squeeze(0) for g in found]


class _Rows:
    """The gradient at a place, with the largest entry of each row, at the scale that it was computed with."""

    def __init__(self, gradient: Tensor | None, largest: Tensor) -> None:
        self.gradient, self.largest = gradient, largest

    @classmethod
    def of(cls, gradient: Tensor | None, place: Place, scale: float) -> _Rows:
        if gradient is None or not gradient.numel():
            return cls(gradient, torch.ones(0))
        largest = torch.linalg.vector_norm(place.masked(gradient).reshape(len(gradient), -1), torch.inf, dim=1)
        if len(largest) != len(gradient):  # one perturbation for all rows
            largest = largest.amax(0, keepdim=True)
        real = place.mask if place.mask is not None and len(place.mask) == len(gradient) else None
        if real is None:
            return cls(gradient / scale, largest)
        some = real.reshape(len(real), -1).any(dim=1).to(largest.device)
        return cls(place.masked(gradient) / scale, torch.where(some, largest, 1.0))  # padding wants no other scale

    def wanting(self, *, up: bool) -> bool:
        return bool(self._wanting(up=up).any())

    def improved(self, other: _Rows, *, up: bool) -> _Rows:
        """Take rows that are missing here from another scale."""
        if self.gradient is None or other.gradient is None:
            return self
        take = self._wanting(up=up) & other.largest.isfinite()
        rows = take.reshape(-1, *[1] * (self.gradient.ndim - 1))
        return _Rows(torch.where(rows, other.gradient, self.gradient), torch.where(take, other.largest, self.largest))

    def _wanting(self, *, up: bool) -> Tensor:
        return self.largest < _FAINT if up else ~self.largest.isfinite()
