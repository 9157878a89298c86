"""Auto-PGD: ascent with momentum, whose step size each row halves for itself when it stops helping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.maximizers.base import AscentState, InnerMaximizer, check_count
from advvl.maximizers.geometry import plain_ascents
from advvl.maximizers.probes import Feedback, Probe, Probes
from advvl.maximizers.rows import Best, losses_of, pick, spread
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.base import Perturber

ALONG, RISING = 0.75, 0.75
"""The share of a move along the new gradient, and the share of moves that must raise the loss to keep the step size."""


@dataclass(frozen=True)
class AutoPGD(InnerMaximizer):
    """Auto-PGD: S moves with momentum; each row adapts its own step size and returns to its best point.

    The ascents' step sizes are the initial ones; the paper's is twice the radius. At checkpoints, which get closer
    together, a row halves its step size and continues from its highest loss so far, if the loss rose in less than 75 %
    of the moves since the last checkpoint, or if neither the step size nor the highest loss has changed since then. A
    row ends at its highest loss; where the attack has `correct=…`, at the highest loss that flips it, if any does.

    Arguments:
        steps: moves, S; one forward and backward for each, and a forward at the last point.

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020, Algorithm 1. Its losses are `cross_entropy` and `dlr` in `advvl.evaluation.objectives`.

    Raises:
        ConfigurationError: steps below 1; without a loss per row; a perturber that is no `EmbeddingPerturber` of finite L2
            or Linf balls, with step sizes that are numbers and rules without a state.
    """

    steps: int

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    @property
    def moves(self) -> int:
        return self.steps

    def check(self, perturber: Perturber) -> None:
        plain_ascents(self, perturber, bounded=True)

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        ascents = plain_ascents(self, perturber, bounded=True)
        best, end = Best(), Best(flips_first=True)
        point = yield Probe(perturber.starts())
        best.see(point)
        end.see(point)
        before, losses, at_best = None, losses_of(point), point.gradients
        scale, rises = torch.ones_like(losses), torch.zeros_like(losses)
        highest, halved = best.losses, torch.zeros_like(losses, dtype=torch.bool)
        last_check, checks = 0, checkpoints(self.steps)
        for move in range(1, self.steps + 1):
            moved = _moved(ascents, point, before, scale)
            before = point.deltas
            point = yield Probe(moved, delta_gradients=move < self.steps)
            rises = rises + (losses_of(point) > losses)
            losses = losses_of(point)
            at_best = pick(best.see(point), point.gradients, at_best, point.places)
            end.see(point)
            if move in checks:
                halved = (rises < RISING * (move - last_check)) | (~halved & (best.losses <= highest))
                scale = torch.where(halved, scale / 2, scale)
                losses = torch.where(halved, best.losses, losses)
                point = Feedback(
                    pick(halved, best.deltas, point.deltas, point.places),
                    pick(halved, at_best, point.gradients, point.places),
                    point.places,
                    losses,
                )
                highest, rises, last_check = best.losses, torch.zeros_like(rises), move
        feedback = yield Probe(end.deltas, weight=1.0, delta_gradients=False, update=True)
        return feedback.deltas


def checkpoints(steps: int) -> set[int]:
    """The moves after which step sizes are checked: 22 % of all, then intervals that shrink by 3 % each, down to 6 %."""
    found, share, interval = set[int](), 22, 22
    while share < 100:
        found.add(-(-share * steps // 100))  # rounded up
        interval = max(interval - 3, 6)
        share += interval
    return found - {steps}


def _moved(
    ascents: Mapping[str, Ascent], point: Feedback, before: Mapping[str, Tensor] | None, scale: Tensor
) -> dict[str, Tensor]:
    """Move every modality along its gradient by its step size times `scale` `(B,)`, and on from the point before."""
    moved = {}
    for modality, gradient in point.gradients.items():
        ascent, delta, place = ascents[modality], point.deltas[modality], point.places[modality]
        assert not callable(ascent.step_size)
        sizes = (ascent.step_size * spread(scale, modality, delta, place)).to(delta.dtype)
        ahead = ascent.project(delta + sizes * ascent.direction(gradient, place), place)
        if before is not None:
            momentum = (1 - ALONG) * (delta - before[modality])
            ahead = ascent.project(delta + ALONG * (ahead - delta) + momentum, place)
        moved[modality] = ahead
    return moved
