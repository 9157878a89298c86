"""Normalised pixels: the map between the pixels of an image and the tensor that a processor makes from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advvl.checks import is_number, is_whole
from advvl.errors import ConfigurationError
from advvl.perturbers.places import delta_dtype


@dataclass(frozen=True)
class Normalised:
    """The normalisation of pixels, (pixels - mean) / std, so that a perturbation is measured in pixels.

    `Ascent(Linf(8 / 255), step_size=2 / 255, box=(0, 1), pixels=Normalised.of(processor))` attacks `pixel_values` as a
    processor gives them.

    Arguments:
        mean, std: of each channel `(C,)`, in the units of the pixels.
        axis: of the channels in the tensor at the site; None: 1, as in `(B, C, H, W)`, of up to four axes.

    Raises:
        ConfigurationError: not one finite mean and one finite deviation above 0 for each channel.
    """

    mean: Sequence[float]
    std: Sequence[float]
    axis: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            values = values.tolist() if isinstance(values, Tensor) else values
            object.__setattr__(self, name, tuple(values) if isinstance(values, Sequence) else values)
        whole = all(isinstance(v, tuple) and v and all(map(_is_finite, v)) for v in (self.mean, self.std))
        if not whole or len(self.mean) != len(self.std) or not all(deviation > 0 for deviation in self.std):
            raise ConfigurationError(
                f"expected a mean and a standard deviation above 0 for each channel, got {self.mean!r} and {self.std!r}"
            )
        if self.axis is not None and (not is_whole(self.axis) or self.axis < 1):
            raise ConfigurationError(f"expected the axis of the channels, 1 or more, got {self.axis!r}")

    @classmethod
    def of(cls, processor: Any) -> Normalised:
        """The normalisation of an image processor of transformers, or of a processor that holds one."""
        inner = getattr(processor, "image_processor", processor)
        rescales = abs(255 * getattr(inner, "rescale_factor", 1 / 255) - 1) < 1e-3
        if not rescales or not all(getattr(inner, does, True) for does in ("do_normalize", "do_rescale")):
            raise ConfigurationError(
                "expected a processor that rescales pixels by 1/255 and normalises them, got one that does not; "
                "give mean and std"
            )
        try:
            return cls(inner.image_mean, inner.image_std)
        except AttributeError as error:
            raise ConfigurationError(
                f"expected a processor with image_mean and image_std, got {type(processor).__name__}; give them yourself"
            ) from error

    def pixels(self, x: Tensor) -> Tensor:
        """The pixels `(B, …)` behind the tensor at a site, in fp32 at least."""
        mean, std = self._spread(x)
        return torch.addcmul(mean, x.to(mean.dtype), std)

    def lengths(self, delta: Tensor) -> Tensor:
        """A perturbation in pixels, from one of the tensor at the site."""
        return delta * self._spread(delta)[1]

    def per_pixel(self, values: Tensor) -> Tensor:
        """The gradient with respect to pixels, from that of the tensor; or a tensor's perturbation, from one in pixels."""
        return values / self._spread(values)[1]

    def bounds(self, box: tuple[float, float], x: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the tensor at the site, broadcastable against it, from bounds of the pixels."""
        mean, std = self._spread(x)
        low, high = ((bound - mean) / std for bound in box)
        return low, high

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axis = 1 if self.axis is None else self.axis
        if self.axis is None and x.ndim > 4:
            raise ConfigurationError(f"expected the axis of the channels of {tuple(x.shape)}, got none; give axis=…")
        if x.ndim <= axis or x.shape[axis] != len(self.mean):
            raise ConfigurationError(
                f"expected {len(self.mean)} channels in axis {axis} of the tensor at the site, got {tuple(x.shape)}; "
                "give a mean for each, or perturb what takes pixel_values"
            )
        shape = [1] * x.ndim
        shape[axis] = len(self.mean)
        mean, std = (torch.tensor(v, dtype=delta_dtype(x), device=x.device) for v in (self.mean, self.std))
        return mean.view(shape), std.view(shape)


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
