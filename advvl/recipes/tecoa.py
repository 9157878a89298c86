"""TeCoA."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from advvl.adapters.injection import Batch
from advvl.adapters.outputs import Outputs
from advvl.checks import check_functions, is_number, shown
from advvl.errors import ConfigurationError
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Loss, Objective
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import image_embedding, perturber_at, steepest
from advvl.training import AdversarialTraining


def zero_shot_loss(
    text_features: Tensor, *, scale: float = 100.0, reads: Callable[[Outputs], Tensor] = image_embedding
) -> Loss:
    """The cross-entropy of scale·cos(φ(x), text) for each row, with the embedding of a text for each class `(C, D)`.

    Raises:
        ConfigurationError: embeddings of another shape or type, a scale that is no number above 0.
    """
    check_functions(reads=reads)
    if not isinstance(text_features, Tensor) or text_features.ndim != 2 or not text_features.is_floating_point():
        got = tuple(text_features.shape) if isinstance(text_features, Tensor) else shown(text_features)
        raise ConfigurationError(f"expected text_features as the embedding of each class (C, D), got {got}")
    if not is_number(scale) or not 0 < scale < math.inf:
        raise ConfigurationError(f"expected a finite scale above 0, got {shown(scale)}")
    texts = F.normalize(text_features.detach(), dim=-1)

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        images = F.normalize(reads(outputs), dim=-1)
        return F.cross_entropy(scale * images @ texts.to(images).T, batch["labels"], reduction="none")

    return loss


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

    Mao et al., "Understanding Zero-shot Adversarial Robustness for Large-Scale Models", ICLR 2023, by PGD as FARE's code
    trains it; see `fare` for the differences.
    """
    ascent = steepest("linf", radius, step_size=step_size, start=Uniform(radius), box=box, pixels=pixels)
    objective = Objective(loss=zero_shot_loss(text_features, scale=scale, reads=reads))
    return AdversarialTraining(perturber_at(modality, ascent), PGD(steps), teach=objective)
