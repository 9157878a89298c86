"""Fast adversarial training: FGSM from a random start."""

from __future__ import annotations

from advvl.maximizers.pgd import PGD
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import check_positive, perturber_at, steepest
from advvl.training import AdversarialTraining


def fgsm_rs(
    *,
    radius: float,
    step_size: float | None = None,
    modality: str = "image",
    box: tuple[float, float] | None = None,
    pixels: Normalised | None = None,
) -> AdversarialTraining:
    """FGSM-RS: L(x + δ) after one sign step from a uniform start, δ = Π(δ₀ + α·sign g); α is 1.25 radii by default.

    Wong, Rice & Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020. Its code sends both
    backwards through the parameters and discards the gradients of the first.
    """
    check_positive("radius", radius)
    size = 1.25 * radius if step_size is None else step_size
    ascent = steepest("linf", radius, step_size=size, start=Uniform(radius), box=box, pixels=pixels)
    return AdversarialTraining(perturber_at(modality, ascent), PGD(1))
