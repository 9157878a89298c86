"""TeCoA."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from advvl.adapters.outputs import Outputs
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import image_embedding, perturber_at, steepest
from advvl.recipes.zero_shot import zero_shot_loss
from advvl.training import AdversarialTraining


def tecoa(
    text_features: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int = 10,
    scale: float = 100.0,
    reads: Callable[[Outputs], Tensor] = image_embedding,
    modality: str = "image",
    box: tuple[float, float] | None = (0.0, 1.0),
    pixels: Normalised | None = None,
) -> AdversarialTraining:
    """TeCoA: `zero_shot_loss` at fixed embeddings of texts `(C, D)`, climbed and taught; classes are `batch["labels"]`.

    Mao et al., "Understanding Zero-shot Adversarial Robustness for Large-Scale Models", ICLR 2023, with PGD as in
    FARE's code; see `fare` for the differences.
    """
    ascent = steepest("linf", radius, step_size=step_size, start=Uniform(radius), box=box, pixels=pixels)
    objective = Objective(loss=zero_shot_loss(text_features, scale=scale, reads=reads))
    return AdversarialTraining(perturber_at(modality, ascent), PGD(steps), teach=objective)
