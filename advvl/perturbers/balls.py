"""Balls: the geometry of how far a perturbation may go, and which way is steepest.

A ball is a value: a radius, and what one norm is taken over (`per="sample"`: all of a sample's entries; `per="token"`:
one position's embedding). `math.inf` means no bound. How a modality moves inside its ball is `perturbers.Ascent`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from advvl import ops
from advvl.checks import is_number
from advvl.errors import ConfigurationError
from advvl.ops import Box, Norm, Per, Rule, Stepped


@dataclass(frozen=True)
class Place:
    """Where a perturbation lives: the tensor it is added to and what belongs to whom in it.

    Arguments:
        x: the unperturbed tensor at the site, `(B, T, D)` or any `(B, ...)`, or `(N, ...)` packed; detached.
        mask: `(B, T)` bool, True at real positions, or None where all are real.
        segments: `(N,)` long, the sample of each row of a packed tensor, or None.
        examples: `(N,)` long, the example of each row where one has several, each in a ball of its own, or None.
    """

    x: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None
    examples: Tensor | None = None


class Ball(ABC):
    """A set that perturbations stay in, with the steepest ascent of its norm."""

    @abstractmethod
    def step(
        self,
        delta: Tensor,
        grad: Tensor,
        place: Place,
        *,
        step_size: float,
        rule: Rule = "normalised",
        floor: float = 0.0,
        box: Box | None = None,
    ) -> Stepped:
        """Step `delta` along `grad`, then back into the ball and the box (see `ops.step_and_project`)."""

    @abstractmethod
    def project(self, delta: Tensor, place: Place, *, box: Box | None = None) -> Tensor:
        """Bring `delta` back into the ball and the box; inside, it is unchanged."""

    @abstractmethod
    def norms(self, delta: Tensor, place: Place) -> Tensor:
        """The norm of every row of `delta`: `(B,)` per sample, `(B, T)` per token."""

    @abstractmethod
    def spread(self, magnitude: float, place: Place) -> Tensor | float:
        """The half-width of a uniform random start of this magnitude, broadcastable against `place.x`."""


@dataclass(frozen=True)
class _FusedBall(Ball):
    """A ball that `ops` knows: it has only to say its norm."""

    radius: float = math.inf
    per: Per = "sample"

    norm: ClassVar[Norm]

    def __post_init__(self) -> None:
        if not is_number(self.radius):
            raise ConfigurationError(f"expected a radius as a number (math.inf: no bound), got {self.radius!r}")
        if not self.radius >= 0:  # NaN fails too
            raise ConfigurationError(f"expected a radius of 0 or more (math.inf: no bound), got {self.radius!r}")
        if self.per not in get_args(Per):
            raise ConfigurationError(f"expected per to be one of {get_args(Per)}, got {self.per!r}")

    def step(
        self,
        delta: Tensor,
        grad: Tensor,
        place: Place,
        *,
        step_size: float,
        rule: Rule = "normalised",
        floor: float = 0.0,
        box: Box | None = None,
    ) -> Stepped:
        return ops.step_and_project(
            delta,
            grad,
            step_size=step_size,
            radius=self.radius,
            norm=self.norm,
            rule=rule,
            per=self.per,
            mask=place.mask,
            segments=place.segments,
            x=place.x if box else None,
            box=box,
            floor=floor,
        )

    def project(self, delta: Tensor, place: Place, *, box: Box | None = None) -> Tensor:
        return ops.project(
            delta,
            radius=self.radius,
            norm=self.norm,
            per=self.per,
            mask=place.mask,
            segments=place.segments,
            x=place.x if box else None,
            box=box,
        )

    def norms(self, delta: Tensor, place: Place) -> Tensor:
        return ops.norms(delta, norm=self.norm, per=self.per, mask=place.mask, segments=place.segments)


@dataclass(frozen=True)
class L2(_FusedBall):
    """The Euclidean ball; its steepest step is `g / ‖g‖`.

    Arguments:
        radius: in the units of the embedding; `math.inf` (no bound) is what VILLA's released configurations use.
        per: what one norm is taken over.

    Raises:
        ConfigurationError: a negative or NaN radius, an unknown `per`.
    """

    norm: ClassVar[Norm] = "l2"

    def spread(self, magnitude: float, place: Place) -> Tensor | float:
        """FreeLB's `magnitude / √(length · D)`, so that a start is never longer than `magnitude`."""
        x = place.x
        if self.per == "token":
            return magnitude / math.sqrt(max(x.shape[-1], 1))
        real = place.mask if place.mask is not None else x.new_ones(x.shape[:1])
        length = real.flatten(1).sum(1) if real.ndim > 1 else real
        length = length.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if place.segments is not None:
            length = torch.zeros_like(length).index_add(0, place.segments, length)[place.segments]
        entries = (length * math.prod(x.shape[real.ndim :])).clamp(min=1)
        return (magnitude / entries.sqrt()).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Linf(_FusedBall):
    """The ball of the largest entry; its step is `g / max|g|` as VILLA publishes it, or `sign(g)` by `rule="sign"`.

    Arguments:
        radius: in the units of the embedding; `math.inf`: no bound.
        per: what one norm is taken over.

    Raises:
        ConfigurationError: a negative or NaN radius, an unknown `per`.
    """

    norm: ClassVar[Norm] = "linf"

    def spread(self, magnitude: float, place: Place) -> Tensor | float:
        return magnitude
