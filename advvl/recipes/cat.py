"""Continuous adversarial training of language models."""

from __future__ import annotations

from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.paired import Paired
from advvl.recipes.answers import away, cross_entropy, of_pairs, toward
from advvl.recipes.parts import perturber_at
from advvl.training import AdversarialTraining


def cat(*, radius: float, step_size: float = 1e-4, steps: int = 10, modality: str = "text") -> AdversarialTraining:
    """CAT: ½ away(shunned | x + δ) + ½ toward(given | x + δ); δ climbs −CE(shunned), by signs, in an L2 ball per token.

    Batches are pairs, and the site's mask is `prompts`: see `advvl.recipes.answers`. Published settings: a radius of
    0.05 mean norms of the embedding table, and an additional plain loss on harmless data. Xhonneux et al., "Efficient
    Adversarial Training in LLMs with Continuous Attacks", NeurIPS 2024. Until 2025-08 the parameter gradients of its
    attack entered the update.
    """
    ascent = Ascent(L2(radius, per="token"), step_size=step_size, rule="sign")
    perturber = Paired(perturber_at(modality, ascent))
    climb = Objective(loss=of_pairs(lambda shunned: -cross_entropy(shunned), None))
    return AdversarialTraining(perturber, PGD(steps), climb=climb, teach=Objective(loss=of_pairs(away, toward)))
