"""Latent adversarial training."""

from __future__ import annotations

from collections.abc import Sequence

from advvl.maximizers.held import Held
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2
from advvl.perturbers.paired import Paired
from advvl.perturbers.rules import Adam
from advvl.recipes.answers import cross_entropy, of_pairs, unlikely
from advvl.recipes.parts import check_names
from advvl.training import AdversarialTraining


def lat(
    modalities: Sequence[str] = ("hidden",),
    *,
    radius: float = 6.0,
    step_size: float = 5e-2,
    steps: int = 16,
    updates: int = 4,
) -> AdversarialTraining:
    """LAT: −½ log(1 − p(shunned)) + ½ CE(given) under δ in hidden layers; δ climbs −½ CE(shunned) + ½ log(1 − p(given)).

    δ moves by Adam in an L2 ball per token and is held for M updates. Batches are pairs, and masks of sites are
    `prompts`: see `advvl.recipes.answers`. Sheshadri et al., "Latent Adversarial Training Improves Robustness to
    Persistent Harmful Behaviors in LLMs", 2024. Its code sets NaN gradients to 0, shrinks δ by weight decay, and
    includes δ's gradient in clipping.
    """
    check_names("modalities", modalities)
    ascent = Ascent(L2(radius, per="token"), step_size=step_size, rule=Adam())
    perturber = Paired(EmbeddingPerturber(**dict.fromkeys(modalities, ascent)))
    climb = of_pairs(lambda shunned: -cross_entropy(shunned), lambda given: -unlikely(given))
    teach = of_pairs(unlikely, cross_entropy)
    maximizer = Held(PGD(steps), updates)
    return AdversarialTraining(perturber, maximizer, climb=Objective(loss=climb), teach=Objective(loss=teach))
