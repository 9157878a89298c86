"""The Kullback-Leibler divergence, in one direction or in both.

Each regulariser maps `(clean, perturbed, mask)` to a scalar: computed from logits in log space, in fp32 (fp64 for
fp64), summed over classes, averaged over rows, and multiplied by its weight. VILLA's J is `SymmetricKL`; where a
published loop averages over two classes too (VCR, NLVR2 of LXMERT-AdvTrain), halve the weight.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from advvl.checks import is_choice, is_number
from advvl.errors import ConfigurationError, ShapeError
from advvl.regularizers.base import Weighted, mean_of, sides
from advvl.regularizers.divergences import Direction, Head, Kind, divergences


@dataclass(frozen=True)
class _Divergence(Weighted):
    head: Head = "softmax"
    detach_clean: bool = False
    temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"expected a finite temperature above 0, got {self.temperature!r}")
        if not is_choice(self.head, get_args(Head)):
            raise ConfigurationError(f"expected head to be one of {get_args(Head)}, got {self.head!r}")

    @property
    def through_clean(self) -> bool:
        return super().through_clean and not self.detach_clean

    @property
    def vanishes_at_equality(self) -> bool:
        return self.temperature == 1

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        given = tuple(clean.shape)
        clean, perturbed = sides(clean, perturbed, mask, "logits", axis=self.axis)
        if self.head == "softmax" and clean.shape[-1:] == (1,):
            raise ShapeError(
                f"expected two classes or more for head='softmax', got {given}; use SquaredDistance() for regression, "
                "head='sigmoid' for yes/no"
            )
        clean = clean.detach() if self.detach_clean else clean
        clean = clean if self.temperature == 1 else clean / self.temperature
        mask = None if mask is None else mask.bool()
        rows = divergences(clean, perturbed, mask, kind=self._kind, head=self.head)
        return self.weight * mean_of(rows, mask)

    @property
    @abstractmethod
    def _kind(self) -> Kind:
        """The name of the divergence."""


@dataclass(frozen=True)
class KL(_Divergence):
    """The Kullback-Leibler divergence, in either direction.

    Arguments:
        weight: factor of the penalty.
        head: `"softmax"` over the last axis, or `"sigmoid"`: one Bernoulli variable a class, summed over classes.
        detach_clean: let no gradient into the clean branch (VAT); False: into both (TRADES, VILLA).
        direction: `"clean||perturbed"` is Σ q (log q − log p) with q clean (VAT, TRADES).
        temperature: of the clean side, whose logits are divided by it: above 1 its probabilities are softer.
        reads, reference, on, rows: as `Regularizer` says.
        axis: of the classes in what is read; None: the last, of up to three axes. A segmentation's is 1.

    Raises:
        ConfigurationError: a weight that is not above 0, an unknown head or direction, a temperature that is not above 0.
    """

    direction: Direction = "clean||perturbed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_choice(self.direction, get_args(Direction)):
            raise ConfigurationError(f"expected direction to be one of {get_args(Direction)}, got {self.direction!r}")

    @property
    def _kind(self) -> Kind:
        return self.direction


@dataclass(frozen=True)
class SymmetricKL(_Divergence):
    """KL(clean‖perturbed) + KL(perturbed‖clean) = Σ (p − q)(log p − log q), VILLA's J; its gradient flows into both.

    Arguments:
        weight: factor of the penalty (VILLA: 1.0 to 1.5).
        head: `"softmax"` over the last axis, also where the task loss is sigmoid, as released; or `"sigmoid"`.
        detach_clean: let no gradient into the clean branch (not what VILLA's released code does).
        temperature: as in `KL`.
        reads, reference, on, rows: as `Regularizer` says.
        axis: of the classes in what is read; None: the last, of up to three axes. A segmentation's is 1.

    Raises:
        ConfigurationError: a weight that is not above 0, an unknown head, a temperature that is not above 0.
    """

    @property
    def _kind(self) -> Kind:
        return "symmetric"
