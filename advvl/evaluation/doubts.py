"""Doubts: the passes over a batch that show whether its attacks can be trusted, beyond those attacks.

Legend: B rows of a batch, R budgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from advvl.errors import NonFiniteError
from advvl.evaluation.attempts import Plan
from advvl.evaluation.measurement import Budget
from advvl.evaluation.named_attacks import AnyAttack
from advvl.evaluation.replacements import differ, negation, others_of, outputs_under, places_of, replacements
from advvl.evaluation.scoring import Batch, Score, targets_of
from advvl.evaluation.verification import length
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.places import Place
from advvl.runtime.randomness import derive_seed

SKIPPED: Final = (
    "",
    "one example in a batch, or rows that are not examples",
    "answers that are not a number at the points of the check",
    "no attack by the model's own gradients",
)
"""The reasons why a check was not made on an example, by their numbers in a record; the first: it was made."""


def doubts(
    plan: Plan, batch: Batch, number: int, clean: Tensor, worst: Tensor, attacks: Sequence[AnyAttack]
) -> dict[str, Tensor]:
    """Make the passes over a batch that flags need beyond its attacks.

    Arguments:
        clean: the scores `(B,)` without perturbation.
        worst: those that attacks by the model's own gradients left within each budget `(R, B)`.
        attacks: these attacks.

    Returns:
        `varies` `(B,)`, bool: the outputs of two forwards differ. `coupled` `(B,)`, bool: the outputs change where other
        examples do. `depends.m` `(B,)`, bool: the outputs change where modality m does. For the modalities of each budget,
        and all of them together: `blind.m+…` `(B,)`, the lowest score where others' replace them, NaN where they cannot;
        `unlimited.m+…` `(B,)`, the score after attacks by gradients that may go as far. `skipped.coupled.m+…`,
        `skipped.depends.m` and `skipped.unlimited.m+…` `(B,)`, whole numbers: why that was not made, of `SKIPPED`.
    """
    score = plan.scored(plan.adapter)
    seeds = [derive_seed(plan.seed, "doubts", number, which) for which in range(2)]
    (_, answers), (_, again) = (outputs_under(plan.adapter, batch, {}, score, seed=seed) for seed in seeds)
    found = {"varies": differ(answers, again)}
    numbers = others_of(targets_of(batch, plan.targets, plan.score), len(clean), clean.device)
    places = places_of(plan.adapter, batch, dict.fromkeys(name for budget in plan.budgets for name in budget))
    found |= _coupled(plan, batch, answers, places, replacements(places, numbers), score, seed=seeds[0])
    for modality, place in places.items():
        changed, skipped = torch.zeros_like(found["varies"]), 2
        box = Ascent(L2(), step_size=1.0, box=plan.boxes.get(modality), pixels=plan.pixels.get(modality))
        opposite = {modality: negation(place, box.bounds(place.x))}
        for deltas in [*replacements({modality: place}, numbers), opposite]:
            try:
                changed |= differ(answers, outputs_under(plan.adapter, batch, deltas, score, seed=seeds[0])[1])
            except NonFiniteError:  # an honest model need not be defined there
                continue
            skipped = 0
        found |= {f"depends.{modality}": changed, f"skipped.depends.{modality}": _all(skipped, clean)}
    for budget in _sets(plan.budgets):
        name = "+".join(budget)
        others = replacements({modality: places[modality] for modality in budget}, numbers)
        floor = reached = torch.full_like(clean, math.nan)
        skipped = 3 if not attacks else 0 if others else 1
        if not skipped:
            far = {
                modality: _unlimited(plan, modality, ball, places[modality], others)
                for modality, ball in budget.items()
            }
            inner = [worst[r] for r, one in enumerate(plan.budgets) if set(one) <= set(budget)]
            try:
                scores = [outputs_under(plan.adapter, batch, deltas, score, seed=seeds[0])[0] for deltas in others]
                reached = _reached(plan, batch, number, far, torch.stack([clean, *inner]).amin(dim=0), attacks)
                floor = torch.fmin(clean, torch.stack(scores).amin(dim=0))
                if len(budget) > 1 and set(budget) == set(plan.adapter.sites):
                    floor = torch.zeros_like(clean)  # nothing is left that could hold the answer
            except NonFiniteError:
                skipped = 2
        found |= {f"blind.{name}": floor, f"unlimited.{name}": reached}
        found[f"skipped.unlimited.{name}"] = _all(skipped, clean)
    return found


def _coupled(
    plan: Plan,
    batch: Batch,
    answers: Tensor,
    places: Mapping[str, Place],
    others: Sequence[Mapping[str, Tensor]],
    score: Score,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Replace every second example, then the rest: the answers of those that stay should stay too."""
    coupled, skipped = torch.zeros(len(answers), dtype=torch.bool, device=answers.device), 0 if others else 1
    numbers = torch.arange(len(answers), device=answers.device)
    for stays in (numbers % 2 == 0, numbers % 2 == 1) if others else ():
        deltas = {
            modality: delta.masked_fill(stays.to(delta.device).view(-1, *[1] * (delta.ndim - 1)), 0)
            for modality, delta in others[0].items()
        }
        try:
            coupled |= stays & differ(answers, outputs_under(plan.adapter, batch, deltas, score, seed=seed)[1])
        except NonFiniteError:
            skipped = 2
    return {"coupled": coupled, f"skipped.coupled.{'+'.join(places)}": _all(skipped, coupled)}


def _all(skipped: int, clean: Tensor) -> Tensor:
    return torch.full_like(clean, skipped, dtype=torch.long)


def _sets(budgets: Sequence[Budget]) -> list[Budget]:
    """A budget for each set of modalities that is perturbed together, and one for all; the largest ball of each."""
    sets: dict[frozenset[str], Budget] = {frozenset(budget): budget for budget in budgets}
    every = {name: ball for budget in budgets for name, ball in budget.items()}
    sets.setdefault(frozenset(every), every)
    return list(sets.values())


def _unlimited(plan: Plan, modality: str, ball: Ball, place: Place, others: Sequence[Mapping[str, Tensor]]) -> Ball:
    """The ball that goes twice as far as to the other examples: beyond that there is nothing to see."""
    assert isinstance(ball, L2 | Linf)
    box = plan.boxes.get(modality)
    ascent = Ascent(type(ball)(per=ball.per), step_size=1.0, pixels=plan.pixels.get(modality))
    far = 2 * max(float(length(ascent, deltas[modality], place, len(place.x)).max()) for deltas in others)
    most = box[1] - box[0] if isinstance(ball, Linf) and box is not None else math.inf
    smallest = ball.radius if not ball.relative else 0.0
    return replace(ball, radius=min(max(far, smallest, 1e-6), most), relative=False)


def _reached(
    plan: Plan, batch: Batch, number: int, far: Budget, scores: Tensor, attacks: Sequence[AnyAttack]
) -> Tensor:
    """The scores left of `scores` `(B,)` after these attacks within a budget."""
    scores = scores.clone()
    for attack in attacks:
        for restart in range(attack.restarts):
            left = scores.nonzero().squeeze(1)
            if len(left):
                purpose: tuple[str | int, ...] = ("unlimited", attack.name, number, *sorted(far), restart)
                made = plan.attempt(attack, batch, left, far, restart, purpose)
                scores[left] = torch.minimum(scores[left], made.scores)
    return scores
