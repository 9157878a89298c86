"""The contract of a perturber."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from advvl.ops import Box, Stepped
from advvl.perturbers.balls import Place
from advvl.perturbers.starts import Start


class Perturber(ABC):
    """Starts and moves the perturbations of named modalities."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """The modalities it perturbs; any others stay clean."""

    @abstractmethod
    def starts(self) -> dict[str, Start]:
        """Where each modality begins."""

    def box(self, modality: str) -> Box | None:
        """The bounds of a modality's perturbed tensor, which an attack holds its input to; None: no bounds."""
        del modality
        return None

    @abstractmethod
    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation of a modality at its site, inside its ball and box, zero at masked positions.

        Arguments:
            modality: one of `modalities`.
            start: usually its own of `starts()`; a maximiser may ask for another, such as a carried one.
            place: the tensor to perturb, `(B, …)`, its mask and samples.
            generator: what is drawn from; None: torch's own.

        Raises:
            ShapeError: a start that is given and does not fit.
        """

    @abstractmethod
    def move(
        self, deltas: Mapping[str, Tensor], gradients: Mapping[str, Tensor], places: Mapping[str, Place]
    ) -> dict[str, Stepped]:
        """One ascent step for every modality that has a gradient.

        Arguments:
            deltas, gradients: of the same shapes, that of the site's tensor.
            places: where each lives.

        Returns:
            Modality to `ops.Stepped`: the moved perturbation, with the norms and flags of its rows.
        """
