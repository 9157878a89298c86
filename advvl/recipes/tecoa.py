"""TeCoA."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from advvl.adapters.injection import Batch
from advvl.adapters.outputs import Outputs
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import EmbeddingPerturber
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import image_embedding, steepest
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
) -> AdversarialTraining:
    """TeCoA: cross-entropy of 100·cos(φ(x + δ), text) with the fixed embedding of a text for each class `(C, D)`.

    Mao et al., "Understanding Zero-shot Adversarial Robustness for Large-Scale Models", ICLR 2023, by PGD as FARE's code
    trains it; see `fare` for the differences. The class is `batch["labels"]` `(B,)`.
    """
    texts = F.normalize(text_features.detach(), dim=-1)

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        images = F.normalize(reads(outputs), dim=-1)
        return F.cross_entropy(scale * images @ texts.to(images).T, batch["labels"], reduction="none")

    ascent = steepest("linf", radius, step_size=step_size, start=Uniform(radius), box=box)
    return AdversarialTraining(EmbeddingPerturber(**{modality: ascent}), PGD(steps), teach=Objective(loss=loss))
