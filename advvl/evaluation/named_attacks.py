"""The attacks of an evaluation: each a value that says what is climbed, how and how often, within whatever budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from torch import nn

from advvl.adapters.base import Adapter
from advvl.checks import at_least, check_functions, instance, is_number, shown, text
from advvl.errors import ConfigurationError
from advvl.evaluation.measurement import Budget
from advvl.evaluation.objectives import Objective, cross_entropy, margin
from advvl.maximizers.base import InnerMaximizer
from advvl.maximizers.pgd import PGD
from advvl.maximizers.random_search import RandomSearch
from advvl.ops import Box
from advvl.passes.from_clean import FromClean
from advvl.passes.objective import Loss
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import Ball
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.rules import Decay, StatefulRule
from advvl.perturbers.starts import Start, Uniform, Zero


def first_clean(restart: int, ball: Ball) -> Start:
    """The clean example for restart 0, a random point of the ball for the others."""
    return Zero() if restart == 0 else Uniform(_radius(ball))


def all_random(restart: int, ball: Ball) -> Start:
    """A random point of the ball for every restart."""
    del restart
    return Uniform(_radius(ball))


@dataclass(frozen=True, kw_only=True)
class NamedAttack:
    """An attack that an evaluation makes at every budget.

    Arguments:
        name: in measurements and on pages.
        maximizer: how it searches; it may ask for gradients or do without.
        objective: from logits and targets to what it climbs, one per row `(B,)`, such as those of `objectives`; None: the
            model's own loss, one per row.
        loss: in the place of an objective: from outputs and batch to `(B,)`, for what logits and targets do not say; or a
            `FromClean`, for what is compared with the clean outputs, such as `objectives.towards(…)`.
        restarts: how often it is made on an example that holds.
        start: from the number of the restart and the ball to where a modality begins; None: `first_clean`, with a
            `FromClean` `all_random`, since the gradient of a distance is zero at the clean example.
        step_fraction: step size as a fraction of the radius, a `Decay` where it shrinks from step to step; None: 2.5/steps,
            with which it can cross the ball.
        rule: of the steps, as `Ascent` takes it.
        surrogate: another model with the same sites that the attack is made on; its perturbations are then tried on the
            model that is evaluated (a transfer attack).

    Raises:
        ConfigurationError: parts that are none.
    """

    name: str
    maximizer: InnerMaximizer
    objective: Objective | None = cross_entropy
    loss: Loss | FromClean | None = None
    restarts: int = 1
    start: Callable[[int, Ball], Start] | None = None
    step_fraction: float | Decay | None = None
    rule: Literal["normalised", "sign"] | StatefulRule | None = None
    surrogate: Adapter | None = None

    def __post_init__(self) -> None:
        text(self, "name")
        instance(InnerMaximizer, self, "maximizer")
        instance((Adapter, type(None)), self, "surrogate")
        at_least(1, self, "restarts")
        loss = None if isinstance(self.loss, FromClean) else self.loss
        check_functions(objective=self.objective, loss=loss, start=self.start)
        fraction = self.step_fraction
        usual = fraction is None or isinstance(fraction, Decay) or (is_number(fraction) and 0 < fraction < math.inf)
        if not usual:
            raise ConfigurationError(
                f"expected step_fraction to be a finite number above 0, a Decay, or None, got {fraction!r}"
            )

    def ascents(
        self, budget: Budget, restart: int, boxes: Mapping[str, Box], pixels: Mapping[str, Normalised]
    ) -> dict[str, Ascent]:
        """The ascent of each modality of a budget in one restart."""
        steps = self.maximizer.moves
        fraction = self.step_fraction or (2.5 / steps if steps else 0.125)
        start = self.start or (all_random if isinstance(self.loss, FromClean) else first_clean)
        return {
            modality: Ascent(
                ball,
                step_size=_times(fraction, _radius(ball)),
                start=start(restart, ball),
                rule=self.rule,
                box=boxes.get(modality),
                pixels=pixels.get(modality),
            )
            for modality, ball in budget.items()
        }


@dataclass(frozen=True, kw_only=True)
class PixelAttack:
    """An attack of others on pixels, such as torchattacks', that an evaluation makes at every budget.

        PixelAttack(name="PGD of torchattacks", make=lambda model, radius: torchattacks.PGD(model, eps=radius))

    What it returns counts, not what it visits. Of the model that it is given no parameter requires grad.

    Arguments:
        name: in measurements and on pages.
        make: from a module, images `(B, C, H, W)` in [0, 1] to logits `(B, A)`, and the budget's radius, to an attack of
            images and labels.
        modality: whose site takes the pixels; no budget may have another.
        field: of the batch, with the pixels as the model takes them.
        gradients: it asks for gradients; False: it is a search without any, and made after the attacks that do.
        one_by_one: attack each example by itself, for attacks that run the model on some of the images alone.
        restarts: how often it is made on an example that holds, each time from another random state.
        surrogate: as of `NamedAttack`.

    Raises:
        ConfigurationError: parts that are none.
    """

    name: str
    make: Callable[[nn.Module, float], Any]
    modality: str = "image"
    field: str = "pixel_values"
    gradients: bool = True
    one_by_one: bool = False
    restarts: int = 1
    surrogate: Adapter | None = None

    def __post_init__(self) -> None:
        text(self, "name", "modality", "field")
        instance(bool, self, "gradients", "one_by_one")
        instance((Adapter, type(None)), self, "surrogate")
        at_least(1, self, "restarts")
        if not callable(self.make):
            raise ConfigurationError(f"expected make to be a function of a model and a radius, got {shown(self.make)}")

    def ascents(
        self, budget: Budget, restart: int, boxes: Mapping[str, Box], pixels: Mapping[str, Normalised]
    ) -> dict[str, Ascent]:
        """The ball of the pixels with their box and normalisation; how they move in it is the attack's own.

        Raises:
            ConfigurationError: a budget of other modalities, or of a radius that is relative.
        """
        del restart
        ball = budget.get(self.modality)
        if ball is None or len(budget) > 1 or getattr(ball, "relative", False):
            raise ConfigurationError(
                f"expected an absolute radius of {self.modality!r} alone for the attack {self.name!r}, got {shown(budget)}; "
                "measure other budgets without it"
            )
        return {
            self.modality: Ascent(
                ball, step_size=_radius(ball), box=boxes.get(self.modality), pixels=pixels.get(self.modality)
            )
        }


AnyAttack = NamedAttack | PixelAttack

DEFAULT: Final = (
    NamedAttack(name="PGD cross-entropy", maximizer=PGD(20), restarts=3),
    NamedAttack(name="PGD margin", maximizer=PGD(20), objective=margin, restarts=3),
    NamedAttack(name="random search", maximizer=RandomSearch(100), objective=margin, step_fraction=2.0),
)
"""The attacks of `worst_case` unless others are given: gradients first, and at the end a search that needs none."""


def in_order(attacks: Sequence[AnyAttack]) -> list[int]:
    """The numbers of attacks in the order in which they are made, whatever the order in which they are given.

    Those by the model's own gradients come first, then those made on another model, then searches without gradients: what
    one of the latter breaks has then withstood the gradients, which a flag looks at.
    """
    return sorted(range(len(attacks)), key=lambda a: (is_search(attacks[a]), attacks[a].surrogate is not None))


def is_search(attack: AnyAttack) -> bool:
    """True for an attack that says that it asks for no gradients."""
    return not (attack.gradients if isinstance(attack, PixelAttack) else attack.maximizer.gradients)


def _times(fraction: float | Decay, radius: float) -> float | Decay:
    """The step size for a radius."""
    return replace(fraction, first=fraction.first * radius) if isinstance(fraction, Decay) else fraction * radius


def _radius(ball: Ball) -> float:
    return float(getattr(ball, "radius", math.inf))
