"""Cross-entropy of soft labels: a teacher's whole distribution as the target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.checks import is_number, is_whole
from advvl.errors import ConfigurationError, ShapeError
from advvl.regularizers.base import Weighted, mean_of, sides, widened


@dataclass(frozen=True)
class SoftCrossEntropy(Weighted):
    """The cross-entropy −Σ q log p of predictions p under a teacher's q = softmax(logits / temperature).

    The gradient is that of KL(q‖p); a synonym to which the teacher gives probability does not count as wrong.

    Arguments:
        weight: factor of the penalty.
        temperature: of the teacher's logits.
        top_k: keep the k most probable classes of each row, their shares made to add up to 1; None: all.
        reads, reference, on, axis: as of any regulariser; `reference` is the teacher, and is required.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Raises:
        ConfigurationError: a weight or temperature that is not above 0, a top_k below 1, no reference.
    """

    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference is None:
            raise ConfigurationError("expected a reference as the teacher, got None; give Averaged(model), say")
        if not is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"expected a finite temperature above 0, got {self.temperature!r}")
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise ConfigurationError(f"expected top_k of 1 or more, or None, got {self.top_k!r}")

    @property
    def vanishes_at_equality(self) -> bool:
        return False

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        if clean.shape[-1] != perturbed.shape[-1]:
            raise ShapeError(
                f"expected a teacher of the same {perturbed.shape[-1]} classes, got {clean.shape[-1]}; "
                "take one with the same vocabulary"
            )
        clean, perturbed = sides(clean, perturbed, mask, "logits", axis=self.axis)
        clean, perturbed = widened(clean.detach(), perturbed, mask)
        rows = -(self._targets(clean) * perturbed.log_softmax(-1)).sum(-1)
        return self.weight * mean_of(rows, mask)

    def _targets(self, logits: Tensor) -> Tensor:
        logits = logits / self.temperature
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return logits.softmax(-1)
        best = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
