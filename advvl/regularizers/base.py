"""The contract of a regulariser: what it reads, what it compares that with, and the penalty."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.regularizers.references import Reference

Readout = str | Callable[[Any], Tensor]
Side = Literal["perturbed", "clean"]


class Regularizer(ABC):
    """A penalty on the difference between the predictions of a pass and those of a reference.

    Arguments (attributes of a class, or fields of an instance):
        reads: the tensor compared: None for the logits, a module's name for its output, or a callable of the outputs.
        reference: the other side; None: the clean pass of the same weights. Any other runs once a round, on the clean
            batch, without gradients.
        on: the pass compared with the reference: each perturbed one, or the clean one (which needs a reference).
    """

    reads: Readout | None = None
    reference: Reference | None = None
    on: Side = "perturbed"

    @property
    @abstractmethod
    def through_clean(self) -> bool:
        """True if gradients flow into the clean branch."""

    @property
    @abstractmethod
    def vanishes_at_equality(self) -> bool:
        """True if value and gradients are zero where both sides are equal, so that a pass may be the clean one."""

    @abstractmethod
    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the penalty, a scalar.

        Arguments:
            clean, perturbed: the two sides; logits `(..., C)`, finite where they count, or what `reads` says.
            mask: the rows of logits that count, of the logits' shape without the last axis; None: all.
        """


def check_regularizer(regularizer: object) -> None:
    """Raise ConfigurationError unless it is a regulariser whose sides make sense."""
    if not isinstance(regularizer, Regularizer):
        raise ConfigurationError(f"expected a regulariser such as SymmetricKL(1.5), or None, got {regularizer!r}")
    if not (regularizer.reads is None or isinstance(regularizer.reads, str) or callable(regularizer.reads)):
        raise ConfigurationError(
            f"expected reads as None, a module's name or a function of the outputs, got {regularizer.reads!r}"
        )
    if not isinstance(regularizer.reference, Reference | None):
        raise ConfigurationError(
            f"expected a reference such as Frozen.copy_of(model), or None, got {type(regularizer.reference).__name__}"
        )
    if regularizer.on not in get_args(Side):
        raise ConfigurationError(f"expected on to be one of {get_args(Side)}, got {regularizer.on!r}")
    if regularizer.on == "clean" and regularizer.reference is None:
        raise ConfigurationError("expected a reference for on='clean', got None: the clean pass equals itself")
