"""Doubts: the passes over a batch that show whether its attacks can be trusted, beyond those attacks.

Legend: B rows of a batch, R budgets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advvl.errors import NonFiniteError
from advvl.evaluation.attempts import Plan
from advvl.evaluation.looks import Look, Skip
from advvl.evaluation.named_attacks import AnyAttack
from advvl.evaluation.replacements import differ, negation, outputs_under, places_of
from advvl.evaluation.scoring import Batch, targets_of
from advvl.evaluation.unlimited import unlimited
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.places import Place
from advvl.runtime.randomness import derive_seed


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
        examples do. `depends.m` `(B,)`, bool: the outputs change where modality m does. `skipped.coupled.m+…` and
        `skipped.depends.m` `(B,)`: why that was not made, a `Skip`. And what `unlimited` finds.
    """
    score = plan.scored(plan.adapter)
    seeds = [derive_seed(plan.seed, "doubts", number, which) for which in range(2)]
    (_, answers), (_, again) = (outputs_under(plan.adapter, batch, {}, score, seed=seed) for seed in seeds)
    targets = targets_of(batch, plan.targets, plan.score)
    look = Look(plan, batch, number, clean, targets, seeds[0], answers)
    places = places_of(plan.adapter, batch, dict.fromkeys(name for budget in plan.budgets for name in budget))
    found = {"varies": differ(answers, again)}
    found["coupled"], found[f"skipped.coupled.{'+'.join(places)}"] = look.coupled(places)
    for modality, place in places.items():
        found[f"depends.{modality}"], found[f"skipped.depends.{modality}"] = _depends(look, modality, place)
    return found | unlimited(look, places, worst, attacks)


def _depends(look: Look, modality: str, place: Place) -> tuple[Tensor, Tensor]:
    """The examples `(B,)` whose outputs change where others' replace a modality, or its negative; and why not made."""
    changed, skipped = torch.zeros_like(look.clean, dtype=torch.bool), Skip.UNDEFINED
    box = Ascent(L2(), step_size=1.0, box=look.plan.boxes.get(modality), pixels=look.plan.pixels.get(modality))
    opposite = {modality: negation(place, box.bounds(place.x))}
    for deltas in [*(one.deltas for one in look.replacements({modality: place})), opposite]:
        try:
            changed |= look.changed(deltas)
        except NonFiniteError:  # an honest model need not be defined there
            continue
        skipped = Skip.MADE
    return changed, look.of_all(skipped)
