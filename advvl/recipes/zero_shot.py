"""Zero-shot classification by fixed embeddings of texts, as several recipes train it."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from advvl.adapters.injection import Batch
from advvl.adapters.outputs import Outputs
from advvl.checks import check_functions, is_number, shown
from advvl.errors import ConfigurationError
from advvl.passes.objective import Loss
from advvl.recipes.parts import image_embedding


def zero_shot_logits(
    text_features: Tensor, *, scale: float = 100.0, reads: Callable[[Outputs], Tensor] = image_embedding
) -> Callable[[Outputs], Tensor]:
    """The function from outputs to scale·cos(φ(x), text) `(B, C)`, with the embedding of a text for each class `(C, D)`.

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

    def logits(outputs: Outputs) -> Tensor:
        images = F.normalize(reads(outputs), dim=-1)
        return scale * images @ texts.to(images).T

    return logits


def zero_shot_loss(
    text_features: Tensor, *, scale: float = 100.0, reads: Callable[[Outputs], Tensor] = image_embedding
) -> Loss:
    """The cross-entropy of `zero_shot_logits` for each row; classes are `batch["labels"]`.

    Raises:
        ConfigurationError: as `zero_shot_logits`.
    """
    logits = zero_shot_logits(text_features, scale=scale, reads=reads)

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(outputs), batch["labels"], reduction="none")

    return loss
