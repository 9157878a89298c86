"""AGFT."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from advvl.adapters.outputs import Outputs
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import image_embedding, perturber_at, steepest
from advvl.recipes.zero_shot import zero_shot_logits
from advvl.regularizers.kl import KL
from advvl.regularizers.references import Frozen, Reference
from advvl.training import AdversarialTraining


def agft(
    model: nn.Module,
    text_features: Tensor,
    *,
    radius: float,
    step_size: float,
    temperature: float,
    steps: int = 10,
    scale: float = 100.0,
    reads: Callable[[Outputs], Tensor] = image_embedding,
    modality: str = "image",
    box: tuple[float, float] | None = (0.0, 1.0),
    pixels: Normalised | None = None,
    reference: Reference | None = None,
) -> AdversarialTraining:
    """AGFT: KL(softmax(z₀(x)/τ)‖softmax(z(x + δ))), climbed and taught, without labels; z₀ is the model as it is now.

    z is `zero_shot_logits` at texts `(C, D)`. Cui et al., "AGFT: Alignment-Guided Fine-Tuning for Zero-Shot Adversarial
    Robustness of Vision-Language Models", CVPR 2026, from its abstract: a reconstruction; the abstract does not give
    the temperature. Where a LoRA adapter is trained, `reference=AdapterOff()` takes z₀ without a copy of the model.
    """
    ascent = steepest("linf", radius, step_size=step_size, start=Uniform(radius), box=box, pixels=pixels)
    logits = zero_shot_logits(text_features, scale=scale, reads=reads)
    penalty = KL(reads=logits, reference=reference or Frozen.copy_of(model), temperature=temperature)
    return AdversarialTraining(perturber_at(modality, ascent), PGD(steps), penalty, teach=Objective(task=0.0))
