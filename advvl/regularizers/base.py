"""The contract of a regulariser."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Regularizer(ABC):
    """A penalty on the difference between clean and perturbed predictions."""

    @property
    @abstractmethod
    def through_clean(self) -> bool:
        """Whether gradients flow into the clean branch."""

    @property
    @abstractmethod
    def vanishes_at_equality(self) -> bool:
        """Whether value and gradients are zero where both predictions are equal, so that pass may be the clean one."""

    @abstractmethod
    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        """The penalty, a scalar.

        Arguments:
            clean, perturbed: logits, `(..., C)`, finite where they count: an answer masked by −inf has no divergence.
            mask: the rows that count, of the logits' shape without the last axis; None: all.
        """
