"""Balls: the geometry of how far a perturbation may go, and which way is steepest.

A ball is a value: a radius, and the entries that one norm is taken over (`per="sample"`: all entries of a sample;
`per="token"`: the embedding of one position). `math.inf` means no bound. How a modality moves inside its ball is
`perturbers.Ascent`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from advvl import ops
from advvl.checks import is_choice, is_number
from advvl.errors import ConfigurationError
from advvl.ops import Box, Norm, Per, Rule, Stepped
from advvl.perturbers.places import Place as Place
from advvl.perturbers.places import delta_dtype

Relative = Literal["row", "batch"]


class Ball(ABC):
    """A set that perturbations stay in, with the steepest ascent of its norm."""

    per: Per = "sample"

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
        """Project `delta` into the ball and the box; inside, it is unchanged."""

    @abstractmethod
    def norms(self, delta: Tensor, place: Place) -> Tensor:
        """The norm of every row of `delta`: `(B,)` per sample, `(B, T)` per token."""

    @abstractmethod
    def spread(self, magnitude: float, place: Place) -> Tensor | float:
        """The half-width of a uniform random start of this magnitude, broadcastable against `place.x`."""

    def unit(self, place: Place) -> Tensor | float:
        """The length that radius, step size and starts are measured in, broadcastable against `place.x`."""
        del place
        return 1.0


@dataclass(frozen=True)
class _NormBall(Ball):
    """A ball of a norm that `ops` computes."""

    radius: float = math.inf
    per: Per = "sample"
    _: KW_ONLY
    relative: bool | Relative = False

    norm: ClassVar[Norm]

    def __post_init__(self) -> None:
        if not is_number(self.radius):
            raise ConfigurationError(f"expected a radius as a number (math.inf: no bound), got {self.radius!r}")
        if not self.radius >= 0:  # NaN fails too
            raise ConfigurationError(f"expected a radius of 0 or more (math.inf: no bound), got {self.radius!r}")
        if not is_choice(self.per, get_args(Per)):
            raise ConfigurationError(f"expected per to be one of {get_args(Per)}, got {self.per!r}")
        if not isinstance(self.relative, bool) and not is_choice(self.relative, get_args(Relative)):
            raise ConfigurationError(
                f"expected relative to be a bool or one of {get_args(Relative)}, got {self.relative!r}"
            )

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
        (rows, gradient, x), mask, segments = place.for_ops(delta, grad, place.x)
        stepped = ops.step_and_project(
            rows,
            gradient,
            step_size=step_size,
            radius=self.radius,
            norm=self.norm,
            rule=rule,
            per=self.per,
            mask=mask,
            segments=segments,
            unit=self._units(place),
            x=x if box else None,
            box=box,
            floor=floor,
        )
        return stepped._replace(delta=stepped.delta.view_as(delta))

    def project(self, delta: Tensor, place: Place, *, box: Box | None = None) -> Tensor:
        (rows, x), mask, segments = place.for_ops(delta, place.x)
        return ops.project(
            rows,
            radius=self.radius,
            norm=self.norm,
            per=self.per,
            mask=mask,
            segments=segments,
            unit=self._units(place),
            x=x if box else None,
            box=box,
        ).view_as(delta)

    def norms(self, delta: Tensor, place: Place) -> Tensor:
        (rows,), mask, segments = place.for_ops(delta)
        found = ops.norms(rows, norm=self.norm, per=self.per, mask=mask, segments=segments)
        return place.of_samples(found) if self.per == "sample" else found.view(delta.shape[:-1])

    def unit(self, place: Place) -> Tensor | float:
        units = self._units(place)
        if units is None:
            return 1.0
        units = units.view(place.x.shape[:-1]) if self.per == "token" else units
        return place.spread(units, self.per).to(delta_dtype(place.x))

    def _units(self, place: Place) -> Tensor | None:
        """The unit of each row, as `ops` takes it of packed tensors; None: 1."""
        if not self.relative:
            return None
        means = place.mean_norms(over_batch=self.relative == "batch")
        if self.per == "sample":
            return means
        return place.packed(place.spread(means, "sample").expand(*place.x.shape[:-1], 1).squeeze(-1))


@dataclass(frozen=True)
class L2(_NormBall):
    """The Euclidean ball; its steepest step is `g / ‖g‖`.

    Arguments:
        radius: in the units of the embedding; `math.inf` (no bound) is what VILLA's released configurations use.
        per: what one norm is taken over.
        relative: measure the radius, step sizes and starts in units of the mean L2 norm of the real positions of the
            tensor at the site, of each sample (True or `"row"`) or of the whole batch in this process (`"batch"`).

    Raises:
        ConfigurationError: a negative or NaN radius, an unknown `per` or `relative`.
    """

    norm: ClassVar[Norm] = "l2"

    def spread(self, magnitude: float, place: Place) -> Tensor | float:
        """FreeLB's `magnitude / √(length · D)`, so that a start is never longer than `magnitude`."""
        x = place.x
        if self.per == "token":
            return magnitude / math.sqrt(max(x.shape[-1], 1)) * self.unit(place)
        packed, mask = place.packed(x), place.packed_mask
        real = x.new_ones(packed.shape[:1]) if mask is None else mask
        length = place.by_sample((real.flatten(1).sum(1) if real.ndim > 1 else real).to(delta_dtype(x)))
        entries = (length * math.prod(packed.shape[real.ndim :])).clamp(min=1)
        return place.spread(magnitude / entries.sqrt(), "sample") * self.unit(place)


@dataclass(frozen=True)
class Linf(_NormBall):
    """The ball of the largest entry; its step is `g / max|g|` as VILLA publishes it, or `sign(g)` by `rule="sign"`.

    Arguments:
        radius: in the units of the embedding; `math.inf`: no bound.
        per: what one norm is taken over.
        relative: as in `L2`.

    Raises:
        ConfigurationError: a negative or NaN radius, an unknown `per` or `relative`.
    """

    norm: ClassVar[Norm] = "linf"

    def spread(self, magnitude: float, place: Place) -> Tensor | float:
        return magnitude * self.unit(place)
