"""The check that attacks without a limit succeed: what no replaced example could hold, an attack has to take away.

Legend: B rows of a batch, R budgets.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from advvl.errors import NonFiniteError, ShapeError, SiteError
from advvl.evaluation.attempts import Plan
from advvl.evaluation.looks import Look, Skip
from advvl.evaluation.measurement import Budget
from advvl.evaluation.named_attacks import AnyAttack, NamedAttack
from advvl.evaluation.replacements import Replacement, places_of
from advvl.evaluation.verification import length
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.places import Place


def unlimited(
    look: Look, places: Mapping[str, Place], worst: Tensor, attacks: Sequence[AnyAttack]
) -> dict[str, Tensor]:
    """Attack the modalities of each budget, those of all budgets, and all that the adapter has, without a limit.

    Arguments:
        places: of the modalities that budgets name.
        worst: the scores that attacks by the model's own gradients left within each budget `(R, B)`.
        attacks: these attacks.

    Returns:
        `blind.m+…` `(B,)`, the lowest score where others replace these modalities, NaN where they cannot; of all modalities
        of the adapter 0. `unlimited.m+…` `(B,)`, the score after the attacks. `skipped.unlimited.m+…` `(B,)`, a `Skip`.
    """
    unnamed, unfit = _unnamed(look, places)
    found: dict[str, Tensor] = {}
    for budget in _sets(look.plan):
        known = budget.keys() <= places.keys()
        fit = [one for one in attacks if isinstance(one, NamedAttack) or budget.keys() == {one.modality}]
        reason = Skip.MADE if known else unfit
        if not attacks:
            reason = reason or Skip.NO_GRADIENTS
        elif not fit:
            reason = reason or Skip.PIXELS
        here = {name: place for name, place in {**places, **unnamed}.items() if name in budget}
        floor, reached, skipped = _attacked(look, budget, here, worst, fit, reason)
        name = "+".join(budget)
        found |= {f"blind.{name}": floor, f"unlimited.{name}": reached, f"skipped.unlimited.{name}": skipped}
    return found


def _attacked(
    look: Look,
    budget: Budget,
    places: Mapping[str, Place],
    worst: Tensor,
    attacks: Sequence[AnyAttack],
    reason: Skip,
) -> tuple[Tensor, Tensor, Tensor]:
    """The floor, the scores after the attacks, and why not made, `(B,)` each, of one set of modalities.

    Arguments:
        reason: why it cannot be made on any example; `Skip.MADE` where it can.
    """
    nothing = torch.full_like(look.clean, math.nan)
    if not look.clean.any():  # that an attack could take away
        return look.clean, look.clean, look.of_all(Skip.MADE)
    others = [] if reason else look.replacements(places)
    if not others:
        return nothing, nothing, look.of_all(reason or Skip.ALONE)
    inner = [worst[r] for r, one in enumerate(look.plan.budgets) if one.keys() <= budget.keys()]
    left = torch.stack([look.clean, *inner]).amin(dim=0)
    try:
        floor = _floor(look, budget, others)
        reached = _reached(look, _far(look.plan, budget, places, others), left, attacks)
    except NonFiniteError:
        return nothing, nothing, look.of_all(Skip.UNDEFINED)
    return floor, reached, torch.where(floor.isnan(), look.of_all(Skip.ALONE), look.of_all(Skip.MADE))


def _sets(plan: Plan) -> list[Budget]:
    """A budget for each set of modalities that is perturbed together, and for all of them; the largest ball of each."""
    sets: dict[frozenset[str], Budget] = {frozenset(budget): budget for budget in plan.budgets}
    named = {name: ball for budget in plan.budgets for name, ball in budget.items()}
    every = named | {name: L2() for name in plan.adapter.sites if name not in named}
    for budget in (named, every):
        sets.setdefault(frozenset(budget), budget)
    return list(sets.values())


def _unnamed(look: Look, places: Mapping[str, Place]) -> tuple[Mapping[str, Place], Skip]:
    """The places of modalities that no budget names, and why they cannot be perturbed with the others, if so.

    Class prompts, which belong to all images, are no examples, also where there happen to be as many.
    """
    names = [name for name in look.plan.adapter.sites if name not in places]
    if not names:
        return {}, Skip.MADE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of masks, say, of modalities that nobody asked to perturb
            found = places_of(look.plan.adapter, look.batch, names)
    except (SiteError, ShapeError):
        return {}, Skip.NO_SITE
    coupled, skipped = look.coupled(found)
    shared = bool(coupled.any())
    return found, Skip.SHARED if shared else Skip(int(skipped.min())) if len(skipped) else Skip.MADE


def _floor(look: Look, budget: Budget, others: Sequence[Replacement]) -> Tensor:
    """The score `(B,)` that attacks without a limit should come to; NaN where nothing says."""
    floor = torch.full_like(look.clean, math.nan)
    for one in others:
        scores = look.under(one.deltas)[0]
        floor = torch.where(one.made, torch.fmin(floor, torch.fmin(look.clean, scores)), floor)
    if len(budget) > 1 and budget.keys() == look.plan.adapter.sites.keys():
        return torch.where(floor.isnan(), floor, 0)  # nothing is left that could hold the answer
    return floor


def _far(plan: Plan, budget: Budget, places: Mapping[str, Place], others: Sequence[Replacement]) -> dict[str, Ball]:
    """The balls that go twice as far as to the other examples: beyond that there is nothing to see."""
    found: dict[str, Ball] = {}
    for modality, ball in budget.items():
        assert isinstance(ball, L2 | Linf)
        box, place = plan.boxes.get(modality), places[modality]
        ascent = Ascent(type(ball)(per=ball.per), step_size=1.0, pixels=plan.pixels.get(modality))
        lengths = [length(ascent, one.deltas[modality], place, len(one.made)).max() for one in others]
        smallest = ball.radius if not ball.relative and math.isfinite(ball.radius) else 0.0
        most = box[1] - box[0] if isinstance(ball, Linf) and box is not None else math.inf
        radius = min(max(2 * float(max(lengths)), smallest, 1e-6), most)
        found[modality] = replace(ball, radius=radius, relative=False)
    return found


def _reached(look: Look, far: Budget, scores: Tensor, attacks: Sequence[AnyAttack]) -> Tensor:
    """The scores left of `scores` `(B,)` after these attacks within a budget."""
    scores = scores.clone()
    for attack in attacks:
        for restart in range(attack.restarts):
            left = scores.nonzero().squeeze(1)
            if len(left):
                purpose: tuple[str | int, ...] = ("unlimited", attack.name, look.number, *sorted(far), restart)
                made = look.plan.attempt(attack, look.batch, left, far, restart, purpose)
                scores[left] = torch.minimum(scores[left], made.scores)
    return scores
