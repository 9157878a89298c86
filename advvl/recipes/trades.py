"""TRADES."""

from __future__ import annotations

from advvl.maximizers.pgd import PGD
from advvl.ops import Norm
from advvl.passes.objective import Objective
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Normal
from advvl.recipes.parts import perturber_at, steepest
from advvl.regularizers.kl import KL
from advvl.training import AdversarialTraining


def trades(
    *,
    radius: float,
    step_size: float,
    steps: int = 10,
    beta: float = 6.0,
    modality: str = "image",
    norm: Norm = "linf",
    box: tuple[float, float] | None = None,
    pixels: Normalised | None = None,
) -> AdversarialTraining:
    """TRADES: the task loss of clean inputs + β KL(clean‖perturbed), into both branches; only the KL is climbed.

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019. Its code climbs in
    eval mode; here the model stays in one mode. Its start is not projected into the box before the first step.
    """
    ascent = steepest(norm, radius, step_size=step_size, start=Normal(1e-3), box=box, pixels=pixels)
    perturber, objective = perturber_at(modality, ascent), Objective(task=0.0)
    return AdversarialTraining(perturber, PGD(steps), KL(beta), clean_weight=1.0, teach=objective)
