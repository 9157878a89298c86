"""Virtual adversarial training."""

from __future__ import annotations

from typing import Literal

from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.starts import Normal
from advvl.recipes.parts import perturber_at
from advvl.regularizers.kl import KL
from advvl.training import AdversarialTraining

_FAR = 1e15  # length of the step in radii: projected into the ball, it is the radius times the gradient's direction


def vat(
    *,
    radius: float,
    xi: float = 1e-4,
    weight: float = 1.0,
    task_weight: float = 1.0,
    modality: str = "image",
    dropout: Literal["fresh", "shared"] = "shared",
) -> AdversarialTraining:
    """VAT: the task loss of clean inputs + KL(clean‖perturbed), clean detached, at the radius along one power iteration.

    Miyato et al., "Virtual Adversarial Training", TPAMI 2019. For a batch without labels use `task_weight=0`. The
    random direction has entries of standard deviation `xi` instead of a norm of 1e-6, whose effect fp32 rounds away.
    """
    ascent = Ascent(L2(radius), step_size=_FAR * radius, start=Normal(xi))
    perturber, objective = perturber_at(modality, ascent), Objective(task=0.0)
    penalty = KL(weight, detach_clean=True)
    return AdversarialTraining(perturber, PGD(1), penalty, clean_weight=task_weight, dropout=dropout, teach=objective)
