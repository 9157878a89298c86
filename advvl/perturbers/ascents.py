"""Perturbers: how the perturbation of each modality starts and moves.

An `Ascent` describes one modality: its ball, step, start, rule and box. `EmbeddingPerturber` holds one ascent per
modality. Neither stores a perturbation: those belong to the step or attack that is running.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from advvl.checks import is_choice, is_number
from advvl.errors import ConfigurationError
from advvl.ops import Box
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.places import Place
from advvl.perturbers.rules import Direction, StatefulRule
from advvl.perturbers.starts import Carried, Given, Sometimes, Start, Zero


class StepMemory(NamedTuple):
    """The memory of an ascent from step to step: the number of steps taken, and the state of its rule."""

    steps: int = 0
    state: Any = None


class AscentStep(NamedTuple):
    """A perturbation after a step, and the memory for the next one."""

    delta: Tensor
    memory: StepMemory


@dataclass(frozen=True)
class Ascent:
    """The way one modality moves.

    Arguments:
        ball: where its perturbation stays.
        step_size: length of an ascent step in the ball's norm, in the units of the embedding; with `rule="sign"` the
            size of each entry's step, so that under L2 a row moves by step_size·√entries. It may be a function of the
            step's number, from 0, such as `Decay(0.1, rate=0.5)`.
        start: where it begins; projected into the ball and the box.
        rule: `"normalised"` by the ball's own norm (Linf: `g / max|g|`, as published), `"sign"`, or a rule with a state,
            `Momentum(…)` or `Adam(…)`. None: the sign in attacks under Linf, normalised elsewhere.
        box: (low, high) bounds of the perturbed tensor itself, for pixels, which must be inside. A pixel outside moves
            towards the box only as far as the ball allows, and an `Attack` refuses it. An Linf radius above the width
            of the box is refused: it bounds nothing, and is usually meant for pixels from 0 to 255.
        pixels: the normalisation that made the tensor at the site; ball, step size, start and box are then in pixels,
            while the perturbation stays in the units of the tensor.
        floor: lower bound of the gradient's norm (1e-8 in VILLA and FreeLB); 0: the step length does not depend on the
            size of the gradient.
        allow_zero_step: accept a step size or a radius of 0, with which nothing ever moves.

    Raises:
        ConfigurationError: a negative, NaN, infinite or (unless allowed) zero step size; a radius of 0 (unless allowed); a
            negative floor; an empty box, or a finite Linf radius above its width; an unknown rule.

    With `relative` in the ball, step size and start are in the unit of its radius.
    """

    ball: Ball
    _: KW_ONLY
    step_size: float | Callable[[int], float]
    start: Start = Zero()  # noqa: RUF009 - frozen, and the same for all
    rule: Literal["normalised", "sign"] | StatefulRule | None = None
    box: Box | None = None
    pixels: Normalised | None = None
    floor: float = 0.0
    allow_zero_step: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ball, Ball):
            raise ConfigurationError(f"expected a ball such as L2(radius), got {self.ball!r}")
        if not isinstance(self.start, Start):
            raise ConfigurationError(f"expected a start such as Uniform(0.1), got {self.start!r}")
        if not callable(self.step_size) and not _is_size(self.step_size):
            raise ConfigurationError(f"expected a finite step size above 0, got {self.step_size!r}")
        if self.step_size == 0 and not self.allow_zero_step:
            raise ConfigurationError(
                "expected a step size above 0, got 0, with which the perturbation never moves; "
                "pass allow_zero_step=True if that is meant"
            )
        if getattr(self.ball, "radius", None) == 0 and not self.allow_zero_step:
            raise ConfigurationError(
                "expected a radius above 0, got 0; pass math.inf for no bound (adv_max_norm 0 of the releases), or "
                "allow_zero_step=True"
            )
        if not isinstance(self.rule, StatefulRule) and not (self.rule is None or is_choice(self.rule, _RULES)):
            raise ConfigurationError(
                f"expected rule to be 'normalised', 'sign', None or a rule such as Momentum(), got {self.rule!r}"
            )
        if not is_number(self.floor) or not (0 <= self.floor < math.inf):
            raise ConfigurationError(f"expected a floor of 0 or more, got {self.floor!r}")
        if self.floor and isinstance(self.rule, StatefulRule):
            raise ConfigurationError(
                f"expected floor=0 beside {type(self.rule).__name__}, which does not step along the gradient itself, got "
                f"{self.floor:g}; leave one of them out"
            )
        if self.pixels is not None and not isinstance(self.pixels, Normalised):
            raise ConfigurationError(f"expected pixels as a Normalised(mean, std), got {self.pixels!r}")
        if self.box is not None and not _is_box(self.box):
            raise ConfigurationError(f"expected a box (low, high) with low < high, got {self.box!r}")
        if self.box is not None and self._holds_the_box():
            raise ConfigurationError(
                f"expected a radius of at most the width of the box {self.box!r}, got {self.ball!r}; give both in one unit, "
                "or math.inf for the box alone"
            )

    def _holds_the_box(self) -> bool:
        """True of an Linf ball that is wider than the box, so that it bounds nothing for any tensor in the box."""
        if not isinstance(self.ball, Linf) or self.ball.relative or self.box is None:
            return False
        return self.box[1] - self.box[0] < self.ball.radius < math.inf

    def begin(self, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation at `place`, inside the ball and the box, zero at masked positions."""
        if isinstance(start, Zero):  # which is in every ball, and a box moves no entry away from it
            return start.make(self.ball, place, generator)
        if self.pixels is None:
            return self.ball.project(start.make(self.ball, place, generator), place, box=self.box)
        inner = replace(self, pixels=None)
        return self.pixels.per_pixel(inner.begin(_in_pixels(start, self.pixels), self._in_pixels(place), generator))

    def step(self, delta: Tensor, grad: Tensor, place: Place, memory: StepMemory = StepMemory()) -> AscentStep:  # noqa: B008
        """One ascent step and the projection after it; `memory` is what the last step returned.

        Raises:
            ConfigurationError: a schedule that gives no step size of 0 or more.
        """
        if self.pixels is not None:
            delta, grad, place = self.pixels.lengths(delta), self.pixels.per_pixel(grad), self._in_pixels(place)
        if isinstance(self.rule, StatefulRule):
            way = self.rule.direction(grad, memory.state, self.ball, place)
        else:
            way = Direction(grad, self.rule or "normalised", None)
        stepped = self.ball.step(
            delta, way.along, place, step_size=self._size(memory.steps), rule=way.rule, floor=self.floor, box=self.box
        )
        moved = stepped.delta if self.pixels is None else self.pixels.per_pixel(stepped.delta)
        return AscentStep(moved, StepMemory(memory.steps + 1, way.state))

    def direction(self, grad: Tensor, place: Place) -> Tensor:
        """The step of length 1, in the unit of the radius, that the rule takes along a gradient, before any projection.

        For maximisers that choose the size of each row's step themselves, with an `L2` or an `Linf` ball.
        """
        free = replace(self, ball=_with_radius(self.ball, math.inf), step_size=1.0, box=None)
        return free.step(torch.zeros_like(grad), grad, place).delta

    def project(self, delta: Tensor, place: Place, scale: Tensor | None = None) -> Tensor:
        """Project a perturbation into the ball and the box.

        Arguments:
            scale: 0 or more, broadcastable against `delta`: the share of the radius (of 1 where that is infinite) within
                which each row is to stay; `math.inf`: the ball's own bound.
        """
        if self.pixels is not None:
            inner = replace(self, pixels=None)
            return self.pixels.per_pixel(inner.project(self.pixels.lengths(delta), self._in_pixels(place), scale))
        if scale is not None:
            known = (scale > 0) & scale.isfinite()
            unit = torch.where(known, scale, torch.ones_like(scale)).to(delta.dtype)
            inside = _with_radius(self.ball, self.reach()).project(delta / unit, place) * unit
            delta = torch.where(known, inside, torch.where(scale > 0, delta, torch.zeros_like(delta)))
        return self.ball.project(delta, place, box=self.box)

    def reach(self) -> float:
        """The radius, or 1 where there is no bound; the unit of shares of the radius."""
        radius = getattr(self.ball, "radius", math.inf)
        return float(radius) if math.isfinite(radius) else 1.0

    def norms(self, delta: Tensor, place: Place) -> Tensor:
        """The norm of every row of `delta` in the units of the ball: `(B,)` per sample, `(B, T)` per token."""
        if self.pixels is None:
            return self.ball.norms(delta, place)
        return self.ball.norms(self.pixels.lengths(delta), place)

    def shares(self, delta: Tensor, place: Place) -> Tensor:
        """The norm of every row as a share of its radius (of 1 where that is infinite), shaped as `norms`."""
        unit = self.unit(place)
        if isinstance(unit, Tensor):
            delta = delta / torch.where(unit > 0, unit, torch.ones_like(unit))
        return self.norms(delta, place) / self.reach()

    def unit(self, place: Place) -> Tensor | float:
        """The length that radius, step size and starts are measured in, broadcastable against `place.x`."""
        return self.ball.unit(self._in_pixels(place))

    def bounds(self, x: Tensor) -> tuple[float | Tensor, float | Tensor] | None:
        """The box in the units of the tensor `x` at the site, broadcastable against it."""
        return self.box if self.box is None or self.pixels is None else self.pixels.bounds(self.box, x)

    def _in_pixels(self, place: Place) -> Place:
        return place if self.pixels is None else replace(place, x=self.pixels.pixels(place.x))

    def for_attack(self) -> Ascent:
        """The same ascent, with the default rule of attacks in place of None."""
        return replace(self, rule="sign") if self.rule is None and isinstance(self.ball, Linf) else self

    def falls_short(self, moves: int) -> bool:
        """True if so many moves from the clean tensor cannot reach the edge of the ball."""
        radius = getattr(self.ball, "radius", math.inf)
        known = not isinstance(self.rule, StatefulRule) and (self.rule != "sign" or isinstance(self.ball, Linf))
        if not known or callable(self.step_size) or radius == math.inf:
            return False
        return isinstance(self.start, Zero) and moves * self.step_size < radius * (1 - 1e-6)

    def for_part(self, weight: float) -> Ascent:
        """The same for a part of a batch; see `Perturber.for_part`."""
        rule = self.rule.for_part(weight) if isinstance(self.rule, StatefulRule) else self.rule
        return replace(self, floor=self.floor / weight, rule=rule)

    def _size(self, step: int) -> float:
        if not callable(self.step_size):
            return self.step_size
        size = self.step_size(step)
        if not _is_size(size):
            raise ConfigurationError(f"expected a finite step size of 0 or more for step {step}, got {size!r}")
        return size


class EmbeddingPerturber(Perturber):
    """One `Ascent` per modality: `EmbeddingPerturber(text=Ascent(…), image=Ascent(…))`.

    Raises:
        ConfigurationError: no modality, or something that is no `Ascent`.
    """

    def __init__(self, **ascents: Ascent) -> None:
        if not ascents:
            raise ConfigurationError(
                "expected at least one modality, as in EmbeddingPerturber(text=Ascent(…)), got none"
            )
        for modality, ascent in ascents.items():
            if not isinstance(ascent, Ascent):
                raise ConfigurationError(f"expected an Ascent for the modality {modality!r}, got {ascent!r}")
        self.ascents: Mapping[str, Ascent] = dict(ascents)

    def __repr__(self) -> str:
        return f"EmbeddingPerturber({', '.join(f'{name}={ascent!r}' for name, ascent in self.ascents.items())})"

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.ascents)

    def starts(self) -> dict[str, Start]:
        return {modality: ascent.start for modality, ascent in self.ascents.items()}

    def box(self, modality: str, x: Tensor) -> tuple[float | Tensor, float | Tensor] | None:
        return self.ascents[modality].bounds(x)

    def unit(self, modality: str, place: Place) -> Tensor | float:
        return self.ascents[modality].unit(place)

    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        return self.ascents[modality].begin(start, place, generator)

    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        moved, kept = {}, dict(memory)
        for modality, gradient in gradients.items():
            before = kept.get(modality, StepMemory())
            moved[modality], kept[modality] = self.ascents[modality].step(
                deltas[modality], gradient, places[modality], before
            )
        return Moved(moved, kept)

    def norms(self, deltas: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        return {modality: self.ascents[modality].norms(delta, places[modality]) for modality, delta in deltas.items()}

    def for_attack(self) -> EmbeddingPerturber:
        return self._with({modality: ascent.for_attack() for modality, ascent in self.ascents.items()})

    def for_part(self, weight: float) -> EmbeddingPerturber:
        return self._with({modality: ascent.for_part(weight) for modality, ascent in self.ascents.items()})

    def _with(self, ascents: Mapping[str, Ascent]) -> EmbeddingPerturber:
        other = copy.copy(self)  # a subclass stays what it is
        other.ascents = ascents
        return other


def _in_pixels(start: Start, pixels: Normalised) -> Start:
    """A given tensor, which is in the units of the tensor at the site, in those of pixels."""
    if isinstance(start, Given | Carried):
        return replace(start, delta=pixels.lengths(start.delta))
    if isinstance(start, Sometimes):
        return replace(start, start=_in_pixels(start.start, pixels))
    return start


_RULES = ("normalised", "sign")


def _with_radius(ball: Ball, radius: float) -> Ball:
    assert isinstance(ball, L2 | Linf)
    return replace(ball, radius=radius)


def _is_size(value: object) -> bool:
    return is_number(value) and 0 <= value < math.inf  # type: ignore[operator]


def _is_box(box: Box) -> bool:
    return isinstance(box, tuple | list) and len(box) == 2 and all(map(is_number, box)) and box[0] < box[1]
