"""Perturbers: how the perturbation of each modality starts and moves.

An `Ascent` says it for one modality: the ball, the step, the start, the rule, the box. `EmbeddingPerturber` holds one
ascent a modality. Neither keeps a perturbation: those belong to the step or attack that is running.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from advvl import ops
from advvl.balls import Ball, Place, is_number
from advvl.errors import ConfigurationError, ShapeError
from advvl.ops import Box, Move, Rule, Stepped


def delta_dtype(x: Tensor) -> torch.dtype:
    """The dtype a perturbation of `x` is kept in: fp64 for fp64, else fp32, whatever `x` is stored as."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Start(ABC):
    """Where a perturbation begins; made at the site, once its shape is known."""

    random: ClassVar[bool] = False  # whether it draws

    @abstractmethod
    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        """A first perturbation of the shape of `place.x`, not yet in the ball, in fp32 (fp64 for fp64).

        Arguments:
            ball: gives magnitudes their meaning.
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
    """Start uniformly in ±magnitude (Linf), or in ±magnitude/√(length·D) (L2: never longer than the magnitude; FreeLB).

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
    """Start at independent normal numbers of standard deviation `scale` (SMART, TRADES), brought into the ball.

    Raises:
        ConfigurationError: a scale that is negative or not finite.
    """

    scale: float

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_magnitude("scale", self.scale)

    def make(self, ball: Ball, place: Place, generator: torch.Generator | None) -> Tensor:
        del ball
        return _draw(torch.randn, place.x, generator) * self.scale


@dataclass(frozen=True, eq=False)
class Given(Start):
    """Start at this tensor, of the very shape of the site.

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
    """Start at the last batch's perturbation: row i feeds row i, sliced or extended by zeros to the new shape (free AT)."""

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


@dataclass(frozen=True)
class Ascent:
    """How one modality moves.

    Arguments:
        ball: where its perturbation stays.
        step_size: length of an ascent step in the ball's norm, in the units of the embedding; with `rule="sign"` the
            size of each entry's step, so that under L2 a row moves by step_size·√entries.
        start: where it begins; brought into the ball and the box.
        rule: `"normalised"` by the ball's own norm (Linf: `g / max|g|`, as published), or `"sign"`.
        box: (low, high) bounds of the perturbed tensor itself, for pixels, which have to be inside; one outside stays
            outside by what the ball does not allow, and an `Attack` refuses it.
        floor: published guard under the gradient's norm (1e-8 in VILLA and FreeLB); 0: a gradient of any size
            steps as far as any other.
        allow_zero_step: accept a step size of 0, with which nothing ever moves.

    Raises:
        ConfigurationError: a negative, NaN, infinite or (unless allowed) zero step size; a negative floor; an empty
            box; an unknown rule.
    """

    ball: Ball
    _: KW_ONLY
    step_size: float
    start: Start = Zero()
    rule: Rule = "normalised"
    box: Box | None = None
    floor: float = 0.0
    allow_zero_step: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ball, Ball):
            raise ConfigurationError(f"expected a ball such as L2(radius), got {self.ball!r}")
        if not isinstance(self.start, Start):
            raise ConfigurationError(f"expected a start such as Uniform(0.1), got {self.start!r}")
        if not is_number(self.step_size) or not (0 <= self.step_size < math.inf):
            raise ConfigurationError(f"expected a finite step size above 0, got {self.step_size!r}")
        if self.step_size == 0 and not self.allow_zero_step:
            raise ConfigurationError(
                "expected a step size above 0, got 0, with which the perturbation never moves; "
                "pass allow_zero_step=True if that is meant"
            )
        if self.rule not in get_args(Rule):
            raise ConfigurationError(f"expected rule to be one of {get_args(Rule)}, got {self.rule!r}")
        if not is_number(self.floor) or not (0 <= self.floor < math.inf):
            raise ConfigurationError(f"expected a floor of 0 or more, got {self.floor!r}")
        if self.box is not None and not _is_box(self.box):
            raise ConfigurationError(f"expected a box (low, high) with low < high, got {self.box!r}")

    def begin(self, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation at `place`, inside the ball and the box, zero at masked positions."""
        return self.ball.project(start.make(self.ball, place, generator), place, box=self.box)

    def step(self, delta: Tensor, grad: Tensor, place: Place) -> Stepped:
        """One ascent step and the projection after it."""
        return self.ball.step(
            delta, grad, place, step_size=self.step_size, rule=self.rule, floor=self.floor, box=self.box
        )

    def move(self, delta: Tensor, grad: Tensor, place: Place) -> Move | None:
        """The same, as a move to be made together with those of other modalities; None where only `step` can make it."""
        if type(self).step is not Ascent.step:  # a subclass that steps in its own way
            return None
        return self.ball.move(
            delta, grad, place, step_size=self.step_size, rule=self.rule, floor=self.floor, box=self.box
        )


class Perturber(ABC):
    """Starts and moves the perturbations of named modalities."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """The modalities it perturbs; any others stay clean."""

    @abstractmethod
    def starts(self) -> dict[str, Start]:
        """Where each modality begins."""

    def box(self, modality: str) -> Box | None:
        """The bounds of a modality's perturbed tensor, which an attack holds its input to; None: no bounds."""
        del modality
        return None

    @abstractmethod
    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation of a modality at its site, inside its ball and box, zero at masked positions.

        Arguments:
            modality: one of `modalities`.
            start: usually its own of `starts()`; a maximiser may ask for another, such as a carried one.
            place: the tensor to perturb, `(B, …)`, its mask and samples.
            generator: what is drawn from; None: torch's own.

        Raises:
            ShapeError: a start that is given and does not fit.
        """

    @abstractmethod
    def move(
        self, deltas: Mapping[str, Tensor], gradients: Mapping[str, Tensor], places: Mapping[str, Place]
    ) -> dict[str, Stepped]:
        """One ascent step for every modality that has a gradient.

        Arguments:
            deltas, gradients: of the same shapes, that of the site's tensor.
            places: where each lives.

        Returns:
            Modality to `ops.Stepped`: the moved perturbation, with the norms and flags of its rows.
        """


class EmbeddingPerturber(Perturber):
    """One `Ascent` a modality: `EmbeddingPerturber(text=Ascent(…), image=Ascent(…))`.

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

    def box(self, modality: str) -> Box | None:
        return self.ascents[modality].box

    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        return self.ascents[modality].begin(start, place, generator)

    def move(
        self, deltas: Mapping[str, Tensor], gradients: Mapping[str, Tensor], places: Mapping[str, Place]
    ) -> dict[str, Stepped]:
        moves = {m: self.ascents[m].move(deltas[m], gradient, places[m]) for m, gradient in gradients.items()}
        fused = {modality: move for modality, move in moves.items() if move is not None}
        stepped = dict(zip(fused, ops.move(list(fused.values())), strict=True))
        return {
            m: stepped[m] if m in stepped else self.ascents[m].step(deltas[m], gradients[m], places[m])
            for m in gradients
        }


def _is_box(box: Box) -> bool:
    return isinstance(box, tuple | list) and len(box) == 2 and all(map(is_number, box)) and box[0] < box[1]


def _check_magnitude(name: str, value: float) -> None:
    if not is_number(value) or not (0 <= value < math.inf):
        raise ConfigurationError(f"expected a finite {name} of 0 or more, got {value!r}")


def _draw(sampler: Callable[..., Tensor], x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers drawn on the generator's own device, so that a CPU generator serves a model on a GPU."""
    device = generator.device if generator is not None else x.device
    return sampler(x.shape, generator=generator, device=device, dtype=delta_dtype(x)).to(x.device)
