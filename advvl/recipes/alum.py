"""ALUM."""

from __future__ import annotations

from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import Linf
from advvl.perturbers.starts import Normal
from advvl.recipes.parts import perturber_at
from advvl.regularizers.kl import KL
from advvl.training import AdversarialTraining


def alum(
    *,
    radius: float = 1e-5,
    step_size: float = 1e-3,
    steps: int = 1,
    weight: float = 1.0,
    modality: str = "text",
) -> AdversarialTraining:
    """ALUM: L(x) + α KL(f(x)‖f(x + δ)), into both branches; the KL alone is climbed. Pre-training takes `weight=10`.

    Liu et al., "Adversarial Training for Large Neural Language Models", 2020. Its code ends at a largest entry of 1 for each
    token whatever the radius, detaches the target of each of two KLs, and never turns the adversarial branch on.
    """
    ascent = Ascent(Linf(radius, per="token"), step_size=step_size, start=Normal(radius))
    perturber, objective = perturber_at(modality, ascent), Objective(task=0.0)
    return AdversarialTraining(perturber, PGD(steps), KL(weight), clean_weight=1.0, teach=objective)
