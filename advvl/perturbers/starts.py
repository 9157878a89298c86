"""Starts: where a perturbation begins."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advvl.checks import is_number
from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers.balls import Ball
from advvl.perturbers.places import Place, delta_dtype
from advvl.runtime.randomness import on_device


class Start(ABC):
    """Where a perturbation begins; made at the site, once its shape is known."""

    random: ClassVar[bool] = False  # whether it draws

    @abstractmethod
    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation, of the shape of `place.x`, before projection into the ball, in fp32 (fp64 for fp64).

        Arguments:
            ball: defines the unit of magnitudes.
            place: the tensor to perturb, its mask and samples.
            generator: what is drawn from; None: torch's own.

        Raises:
            ShapeError: a start that is given and does not fit.
        """


@dataclass(frozen=True)
class Zero(Start):
    """Start at zero, as the released VILLA does."""

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        del ball, generator
        return torch.zeros_like(place.x, dtype=delta_dtype(place.x))


@dataclass(frozen=True)
class Uniform(Start):
    """Start uniformly in ±magnitude (Linf), or in ±magnitude/√(length·D) (L2: never longer than the magnitude).

    The latter is FreeLB's start, and NEFTune's noise; the length counts real positions.

    Raises:
        ConfigurationError: a magnitude that is negative or not finite.
    """

    magnitude: float

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_magnitude("magnitude", self.magnitude)

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        uniform = _draw(torch.rand, place.x, generator)
        return (2 * uniform - 1) * ball.spread(self.magnitude, place)


@dataclass(frozen=True)
class Normal(Start):
    """Start at independent normal numbers of standard deviation `scale` (SMART, TRADES), projected into the ball.

    Raises:
        ConfigurationError: a scale that is negative or not finite.
    """

    scale: float

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_magnitude("scale", self.scale)

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        return _draw(torch.randn, place.x, generator) * self.scale * ball.unit(place)


@dataclass(frozen=True)
class Sometimes(Start):
    """Start as another start does, with a given probability, and otherwise at zero; one draw for the batch (DAT).

    Raises:
        ConfigurationError: no start, a probability outside [0, 1].
    """

    start: Start
    _: KW_ONLY
    probability: float

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.start, Start):
            raise ConfigurationError(f"expected a start such as Uniform(0.1), got {self.start!r}")
        if not is_number(self.probability) or not 0 <= self.probability <= 1:
            raise ConfigurationError(f"expected a probability in [0, 1], got {self.probability!r}")

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        coin = _draw(torch.rand, place.x.new_empty(()), generator)
        made = self.start.make(ball, place, generator)
        return torch.where(coin < self.probability, made, torch.zeros_like(made))


@dataclass(frozen=True, eq=False)
class Given(Start):
    """Start at this tensor, which must have the shape of the tensor at the site.

    Raises:
        ShapeError: when the site has another shape.
    """

    delta: Tensor

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        del ball, generator
        if self.delta.shape != place.x.shape:
            raise ShapeError(f"expected a start of shape {tuple(place.x.shape)}, got {tuple(self.delta.shape)}")
        return self.delta.detach().to(place.x.device, delta_dtype(place.x), copy=True)


@dataclass(frozen=True, eq=False)
class Carried(Start):
    """Start at the last batch's perturbation, row by row, sliced or extended by zeros to the new shape (free AT)."""

    delta: Tensor

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        del ball, generator
        start = torch.zeros_like(place.x, dtype=delta_dtype(place.x))
        if self.delta.ndim != start.ndim:
            raise ShapeError(
                f"expected a carried perturbation of {start.ndim} axes, got {tuple(self.delta.shape)}; "
                "start a new state for another model"
            )
        common = tuple(slice(min(a, b)) for a, b in zip(start.shape, self.delta.shape, strict=True))
        start[common] = self.delta[common].to(start)
        return start


def _check_magnitude(name: str, value: float) -> None:
    if not is_number(value) or not (0 <= value < math.inf):
        raise ConfigurationError(f"expected a finite {name} of 0 or more, got {value!r}")


def _draw(sampler: Callable[..., Tensor], x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers on the device of `x`; see `on_device` for generators of another device."""
    there = None if generator is None else on_device(generator, x.device)
    return sampler(x.shape, generator=there, device=x.device, dtype=delta_dtype(x))
