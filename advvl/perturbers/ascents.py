"""Perturbers: how the perturbation of each modality starts and moves.

An `Ascent` says it for one modality: the ball, the step, the start, the rule, the box. `EmbeddingPerturber` holds one
ascent a modality. Neither keeps a perturbation: those belong to the step or attack that is running.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import get_args

import torch
from torch import Tensor

from advvl.checks import is_number
from advvl.errors import ConfigurationError
from advvl.ops import Box, Rule, Stepped
from advvl.perturbers.balls import Ball, Place
from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.starts import Start, Zero


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
    start: Start = Zero()  # noqa: RUF009 - frozen, and the same for all
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
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        moved = {m: self.ascents[m].step(deltas[m], gradient, places[m]).delta for m, gradient in gradients.items()}
        return Moved(moved, memory)

    def norms(self, deltas: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        return {
            modality: self.ascents[modality].ball.norms(delta, places[modality]) for modality, delta in deltas.items()
        }


def _is_box(box: Box) -> bool:
    return isinstance(box, tuple | list) and len(box) == 2 and all(map(is_number, box)) and box[0] < box[1]
