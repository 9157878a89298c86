"""Training against modality interference."""

from __future__ import annotations

from collections.abc import Sequence

from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import EmbeddingPerturber
from advvl.perturbers.starts import Zero
from advvl.recipes.parts import check_names, steepest
from advvl.regularizers.js import JensenShannon
from advvl.training import AdversarialTraining


def modality_interference(
    modalities: Sequence[str] = ("image_tokens", "text"),
    *,
    radius: float,
    step_size: float,
    steps: int = 1,
    weight: float = 1.0,
) -> AdversarialTraining:
    """Modality interference: L(x) + L(x + δ) + λ JS(f(x), f(x + δ)); δ climbs L at the modality that a row does not need.

    The masks of the sites select that modality: they are all False in the rows that need it. "Diagnosing and Mitigating
    Modality Interference in Multimodal Large Language Models", arXiv:2505.19616, 2025. Its code steps by α times the
    raw gradient, which depends on the scale of the loss, and makes every parameter require grad after the first step;
    here steps are signs, and neither happens.
    """
    check_names("modalities", modalities)
    ascent = steepest("linf", radius, step_size=step_size, start=Zero())
    perturber, climb = EmbeddingPerturber(**dict.fromkeys(modalities, ascent)), Objective(penalty=0.0)
    return AdversarialTraining(perturber, PGD(steps), JensenShannon(weight), clean_weight=1.0, climb=climb)
