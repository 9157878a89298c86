"""Minimum-norm attack: for each example, the smallest perturbation that flips it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.maximizers.base import AscentState, InnerMaximizer, check_count
from advvl.maximizers.geometry import plain_ascents
from advvl.maximizers.probes import Feedback, Probe, Probes
from advvl.maximizers.rows import Best, gather, losses_of, pick, spread, verdicts_of
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.base import Perturber

FIRST_CHANGE, LAST_CHANGE = 0.05, 1e-4
"""The factor by which the bound of a row grows or shrinks in a move, at the first and the last move."""


@dataclass(frozen=True)
class MinimumNorm(InnerMaximizer):
    """Fast minimum-norm attack: each row climbs within its own bound, which shrinks while the row is flipped.

    Until a row is flipped, its bound is slightly more than its distance to the boundary as estimated by the gradient.
    The ascents' step sizes are the initial ones, of the order of the radius; they shrink along half a cosine. A row
    ends at the smallest perturbation that flipped it. A row that was never flipped ends at its highest margin and is
    still correct in the result.

    The size of a perturbation is its norm as a share of the radius, the largest over all modalities; in a ball of
    infinite radius it is the norm itself. No perturbation leaves its ball. With a large enough radius, the accuracy at
    any smaller radius is the share of rows whose size is above it, so one run gives the whole curve.

    Arguments:
        steps: moves; one forward and backward for each, and a forward at the last point.

    Source: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints", NeurIPS 2021; here
    with the step of the ascent's rule, the sign under Linf. Its L2 form is close to DDN (Rony et al., CVPR 2019).

    Raises:
        ConfigurationError: steps below 1; without a loss or a verdict per row; a loss that is above 0 where a row is
            correct, thus no margin; a perturber that `AutoPGD` would refuse, except for an infinite radius.
    """

    steps: int

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    def check(self, perturber: Perturber) -> None:
        plain_ascents(self, perturber, bounded=False)

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        ascents = plain_ascents(self, perturber, bounded=False)
        best = Best()
        point = yield Probe(perturber.starts())
        _check_margin(point)
        flips, smallest = point.deltas, torch.full_like(losses_of(point), math.inf)
        bound = torch.full_like(smallest, math.inf)
        for move in range(self.steps + 1):
            best.see(point)
            size, flipped = _sizes(ascents, point), ~_verdicts(point)
            smaller = flipped & (size < smallest)
            flips = pick(smaller, point.deltas, flips, point.places)
            smallest = torch.where(smaller, size, smallest)
            if move == self.steps:
                break
            share = (1 + math.cos(math.pi * move / self.steps)) / 2
            change = LAST_CHANGE + (FIRST_CHANGE - LAST_CHANGE) * share
            ways = {m: ascents[m].direction(gradient, point.places[m]) for m, gradient in point.gradients.items()}
            boundary = size - losses_of(point) / _slopes(ascents, ways, point)
            wider = torch.where(smallest.isfinite(), bound, boundary) * (1 + change)
            bound = torch.where(flipped, torch.minimum(bound * (1 - change), smallest), wider)
            moved = {m: _moved(ascents[m], m, way, point, bound, share) for m, way in ways.items()}
            point = yield Probe(moved, delta_gradients=move + 1 < self.steps)
        deltas = pick(smallest.isfinite(), flips, best.deltas, point.places)
        feedback = yield Probe(deltas, weight=1.0, delta_gradients=False, update=True)
        return feedback.deltas


def _verdicts(point: Feedback) -> Tensor:
    return verdicts_of(point, "look for the smallest flip")


def _check_margin(point: Feedback) -> None:
    """Refuse a loss that is not a margin, which would give a wrong distance to the boundary; reads from the device."""
    wrong = _verdicts(point) & (losses_of(point) > 0)
    if wrong.any():
        raise ConfigurationError(
            f"expected a margin as loss, below 0 where a row is correct, got one above 0 in {int(wrong.sum())} such rows; "
            "give the attack loss=…"
        )


def _sizes(ascents: Mapping[str, Ascent], point: Feedback) -> Tensor:
    """The size of each example's perturbation `(B,)`: the largest share of its radius in any modality."""
    found = torch.zeros_like(losses_of(point))
    for modality, delta in point.deltas.items():
        ascent, place = ascents[modality], point.places[modality]
        shares = ascent.shares(delta, place)
        if ascent.ball.per == "token" or place.segments is None:
            rows = gather(shares, place, found, "amax")
        else:  # by the number of the sample already
            rows = torch.zeros_like(found)
            rows[: len(shares)] = shares.to(found.dtype)[: len(rows)]
        found = torch.maximum(found, rows)
    return found


def _slopes(ascents: Mapping[str, Ascent], ways: Mapping[str, Tensor], point: Feedback) -> Tensor:
    """The rise of each example's loss `(B,)` by the gradient if its size grows by 1 along `ways` in all modalities."""
    found = torch.zeros_like(losses_of(point))
    for modality, way in ways.items():
        rises = torch.where(way == 0, 0.0, way * point.gradients[modality])  # masked gradients may be anything
        found = found + ascents[modality].reach() * gather(rises, point.places[modality], found, "sum")
    return found


def _moved(ascent: Ascent, modality: str, way: Tensor, point: Feedback, bound: Tensor, share: float) -> Tensor:
    delta, place = point.deltas[modality], point.places[modality]
    assert not callable(ascent.step_size)
    return ascent.project(delta + share * ascent.step_size * way, place, spread(bound, modality, delta, place))
