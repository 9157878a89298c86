"""PGD adversarial training."""

from __future__ import annotations

from advvl.maximizers.pgd import PGD
from advvl.ops import Norm
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import perturber_at, steepest
from advvl.training import AdversarialTraining


def pgd(
    *,
    radius: float,
    step_size: float,
    steps: int = 7,
    modality: str = "image",
    norm: Norm = "linf",
    box: tuple[float, float] | None = None,
    pixels: Normalised | None = None,
) -> AdversarialTraining:
    """PGD adversarial training: S moves from a random start, then one pass to learn from.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    ascent = steepest(norm, radius, step_size=step_size, start=Uniform(radius), box=box, pixels=pixels)
    return AdversarialTraining(perturber_at(modality, ascent), PGD(steps))
