"""Rules that use earlier gradients as well as the current one, and step sizes that change from step to step.

A rule is a value without state. Its state is passed along with the perturbations, through the maximiser, and ends with
the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from advvl.checks import is_choice, is_number
from advvl.errors import ConfigurationError
from advvl.ops import Rule
from advvl.perturbers.balls import Ball, Linf
from advvl.perturbers.places import Place, delta_dtype


class Direction(NamedTuple):
    """The direction of a step, the way in which `ops` steps along it, and the rule's state for the next step."""

    along: Tensor
    rule: Rule
    state: Any


class StatefulRule(ABC):
    """A way to step that depends on the gradients of earlier steps."""

    @abstractmethod
    def direction(self, grad: Tensor, state: Any, ball: Ball, place: Place) -> Direction:
        """The direction of the next step.

        Arguments:
            grad: of the perturbation, of the shape of `place.x`; anything at masked positions.
            state: what the last call returned; None in the first.
            ball, place: where the perturbation stays and lives.

        Returns:
            A direction that is zero at masked positions, and in rows whose gradient is not finite, whose state stays.
        """

    def for_part(self, weight: float) -> StatefulRule:
        """The rule for a part of a batch; see `Perturber.for_part`."""
        del weight
        return self


@dataclass(frozen=True)
class Momentum(StatefulRule):
    """Gradients added up with decay: `v ← decay·v + g/‖g‖₁` for each row, then a step along v.

    Under Linf the step is along the sign of v, as in MI-FGSM (Dong et al., "Boosting Adversarial Attacks with Momentum",
    CVPR 2018); under any other ball along v normalised, as in its L2 form.

    Arguments:
        decay: 0 forgets at once; MI-FGSM's is 1.
        of: the `"gradient"`, or its `"sign"`: `v ← sign(decay·v + sign(g))` and a step along v, as the code of Robust
            CLIP (Schlarmann et al., ICML 2024) has it; with a decay below 1 the past matters only where the gradient is
            zero.

    Raises:
        ConfigurationError: a decay that is negative or not finite, an unknown `of`.
    """

    decay: float = 0.9
    _: KW_ONLY
    of: Literal["gradient", "sign"] = "gradient"

    def __post_init__(self) -> None:
        if not is_number(self.decay) or not (0 <= self.decay < math.inf):
            raise ConfigurationError(f"expected a finite decay of 0 or more, got {self.decay!r}")
        if not is_choice(self.of, ("gradient", "sign")):
            raise ConfigurationError(f"expected of to be 'gradient' or 'sign', got {self.of!r}")

    def direction(self, grad: Tensor, state: Tensor | None, ball: Ball, place: Place) -> Direction:
        g, finite = _usable(grad, ball, place)
        before = torch.zeros_like(g) if state is None else state
        if self.of == "sign":
            velocity = (self.decay * before + g.sign()).sign()
        else:
            sizes = place.spread(place.row_sums(g.abs(), ball.per), ball.per)
            velocity = self.decay * before + (g / torch.where(sizes > 0, sizes, torch.ones_like(sizes))).to(g.dtype)
        signs = self.of == "sign" or isinstance(ball, Linf)
        along = torch.where(finite, velocity, torch.zeros_like(velocity))
        return Direction(along, "sign" if signs else "normalised", torch.where(finite, velocity, before))


class AdamState(NamedTuple):
    """Adam's averages: of the gradient, the root of that of its square, and the number of gradients of each row."""

    mean: Tensor
    root: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Adam(StatefulRule):
    """Adam as `torch.optim.Adam(maximize=True)` steps, with the step size as its learning rate, then the projection.

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015. Latent adversarial training climbs by it.

    Arguments:
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the latter. Where gradients are not far above it, the step depends on how the loss is
            reduced; 0: the step does not depend on the size of the gradient.

    Raises:
        ConfigurationError: a beta outside [0, 1), an eps that is negative or not finite.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    _: KW_ONLY
    eps: float = 1e-8

    def __post_init__(self) -> None:
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(f"expected two betas in [0, 1), got {self.betas!r}")
        if not is_number(self.eps) or not (0 <= self.eps < math.inf):
            raise ConfigurationError(f"expected a finite eps of 0 or more, got {self.eps!r}")

    def for_part(self, weight: float) -> Adam:
        return replace(self, eps=self.eps / weight)

    def direction(self, grad: Tensor, state: AdamState | None, ball: Ball, place: Place) -> Direction:
        g, finite = _usable(grad, ball, place)
        zero = torch.zeros_like(g)
        before = AdamState(zero, zero, torch.zeros_like(finite, dtype=torch.float64)) if state is None else state
        (first, second), seen = self.betas, before.seen + 1
        mean = first * before.mean + (1 - first) * g
        root = torch.hypot(math.sqrt(second) * before.root, math.sqrt(1 - second) * g)  # g² would over- or underflow
        over = root / (1 - second**seen).sqrt().to(g.dtype) + self.eps
        step = mean / (1 - first**seen).to(g.dtype) / torch.where(over > 0, over, torch.ones_like(over))
        after = AdamState(*(torch.where(finite, new, old) for new, old in zip((mean, root, seen), before, strict=True)))
        return Direction(torch.where(finite, step, zero), "plain", after)


@dataclass(frozen=True)
class Decay:
    """A step size that shrinks from step to step: `first · rate^step`, step from 0.

    Raises:
        ConfigurationError: a first step size or rate that is not above 0 and finite.
    """

    first: float
    _: KW_ONLY
    rate: float

    def __post_init__(self) -> None:
        for name in ("first", "rate"):
            value = getattr(self, name)
            if not is_number(value) or not (0 < value < math.inf):
                raise ConfigurationError(f"expected a finite {name} above 0, got {value!r}")

    def __call__(self, step: int) -> float:
        return float(self.first * self.rate**step)


def _usable(grad: Tensor, ball: Ball, place: Place) -> tuple[Tensor, Tensor]:
    """The gradient, zero at masked positions and in rows where it is not finite; and which rows it is finite in."""
    g = place.masked(grad.to(delta_dtype(grad)))
    bad = place.row_sums(~g.isfinite(), ball.per)
    finite = place.spread(bad == 0, ball.per)
    return torch.where(finite, g, torch.zeros_like(g)), finite
