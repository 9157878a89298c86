"""SMART."""

from __future__ import annotations

from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import Linf
from advvl.perturbers.starts import Normal
from advvl.recipes.parts import perturber_at
from advvl.regularizers.kl import SymmetricKL
from advvl.regularizers.references import Averaged
from advvl.training import AdversarialTraining


def smart(
    *,
    radius: float = 1e-5,
    step_size: float = 1e-3,
    steps: int = 1,
    weight: float = 1.0,
    bregman: Averaged | None = None,
    bregman_weight: float = 1.0,
    modality: str = "text",
) -> AdversarialTraining:
    """SMART: the task loss of clean inputs + λ symmetric KL, climbed alone; `bregman`: + μ symmetric KL to an average.

    Jiang et al., "SMART: Robust and Efficient Fine-Tuning …", ACL 2020, Algorithm 1. Its code scales every token's
    perturbation to a largest entry of 1, climbs another function, detaches each target, and has no Bregman term.
    """
    ascent = Ascent(Linf(radius, per="token"), step_size=step_size, start=Normal(radius))
    proximal = () if bregman is None else (SymmetricKL(bregman_weight, reference=bregman, on="clean"),)
    perturber, penalties = perturber_at(modality, ascent), (SymmetricKL(weight), *proximal)
    return AdversarialTraining(perturber, PGD(steps), penalties, clean_weight=1.0, teach=Objective(task=0.0))
