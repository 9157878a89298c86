"""PMG-AFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from advvl.adapters.outputs import Outputs
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import image_embedding, perturber_at, steepest
from advvl.recipes.zero_shot import zero_shot_logits, zero_shot_loss
from advvl.regularizers.kl import KL
from advvl.regularizers.references import Frozen, Reference
from advvl.training import AdversarialTraining


def pmg_aft(
    model: nn.Module,
    text_features: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int = 2,
    alpha: float = 1.0,
    beta: float = 1.0,
    scale: float = 100.0,
    reads: Callable[[Outputs], Tensor] = image_embedding,
    modality: str = "image",
    box: tuple[float, float] | None = (0.0, 1.0),
    reference: Reference | None = None,
) -> AdversarialTraining:
    """PMG-AFT: CE(x + δ) + α KL(p₀(x)‖p(x + δ)) + β KL(p(x)‖p(x + δ)); the CE alone is climbed; p₀ is the model now.

    p is the softmax of `zero_shot_logits` at texts `(C, D)`. Wang et al., "Pre-trained Model Guided Fine-Tuning for
    Zero-Shot Adversarial Robustness", CVPR 2024; the direction of each KL, and p₀ at clean images, are our reading.
    Where a LoRA adapter is trained, `reference=AdapterOff()` takes p₀ from the model itself, without a copy.
    """
    perturber = perturber_at(modality, steepest("linf", radius, step_size=step_size, start=Uniform(radius), box=box))
    logits = zero_shot_logits(text_features, scale=scale, reads=reads)
    penalties = KL(alpha, reads=logits, reference=reference or Frozen.copy_of(model)), KL(beta, reads=logits)
    teach = Objective(loss=zero_shot_loss(text_features, scale=scale, reads=reads))
    return AdversarialTraining(perturber, PGD(steps), penalties, climb=replace(teach, penalty=0.0), teach=teach)
