"""The contract of a perturber."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advvl.errors import ShapeError
from advvl.perturbers.places import Place
from advvl.perturbers.starts import Start

Memory = Mapping[str, Any]  # from modality to what it keeps between steps: numbers of steps, states of rules


class Moved(NamedTuple):
    """The perturbations after an ascent step, and the memory for the next one."""

    deltas: dict[str, Tensor]
    memory: Memory


class Perturber(ABC):
    """Starts and moves the perturbations of named modalities."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it perturbs; all others stay clean."""

    @abstractmethod
    def starts(self) -> dict[str, Start]:
        """Where each modality begins."""

    def box(self, modality: str, x: Tensor) -> tuple[float | Tensor, float | Tensor] | None:
        """The bounds of a modality's perturbed tensor, broadcastable against that at its site, `x`; None: no bounds."""
        del modality, x
        return None

    def unit(self, modality: str, place: Place) -> Tensor | float:
        """The length that radii are measured in, broadcastable against the tensor at the site; 0 where nothing can move."""
        del modality, place
        return 1.0

    @property
    def additive(self) -> bool:
        """True if `apply` adds the perturbation and does no more, so that it shows how much of it a cast leaves."""
        return True

    def for_attack(self) -> Perturber:
        """The perturber that an attack uses, if it differs from the one for training."""
        return self

    def for_part(self, weight: float) -> Perturber:
        """The perturber for a part of a batch, whose mean weighs `weight` in (0, 1) among those of all parts.

        Gradients of the part's mean are 1/weight times as large as those of the mean over the whole batch. A perturber
        that compares their size with a constant, such as a floor, has to scale the constant by 1/weight; most do not
        need to.
        """
        del weight
        return self

    @abstractmethod
    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation of a modality at its site, inside its ball and box, zero at masked positions.

        Arguments:
            modality: one of `modalities`.
            start: usually the one from `starts()`; a maximiser may use another, such as a carried one.
            place: the tensor to perturb, `(B, …)`, its mask and samples.
            generator: what is drawn from; None: torch's own.

        Raises:
            ShapeError: a start that is given and does not fit.
        """

    @abstractmethod
    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        """Take one ascent step for every modality that has a gradient.

        Arguments:
            deltas, gradients: modality to tensors of one shape, that of the site's tensor.
            places: where each perturbation lives.
            memory: what the last call returned, `{}` in the first; entries of modalities without a gradient are kept.

        Returns:
            The moved perturbations, and the memory for the next call.
        """

    def norms(self, deltas: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        """The norm of each row of each perturbation, for reports; `{}` where the perturber has no norm."""
        del deltas, places
        return {}

    def apply(self, modality: str, place: Place, x: Tensor, delta: Tensor) -> Tensor:
        """The site's tensor under the perturbation: x + δ, added in the wider precision of both and cast once.

        This is the only place where a perturbation is applied to a tensor, so a discrete codebook Q(x + δ) (DAT) or one
        δ for the whole batch (`UniversalPerturber`) overrides only this. It is called in every forward of the site, and
        again when activation checkpointing repeats the forward, so the result must depend only on the arguments.

        Arguments:
            modality: one of `modalities`.
            place: where the perturbation lives: the detached tensor, its mask and samples.
            x: the tensor at the site, `(B, …)`, with its graph.
            delta: the perturbation, a leaf of the pass's graph, as `begin` and `move` give it.

        Returns:
            A tensor of the shape and dtype of `x`, differentiable in `x` and `delta`.

        Raises:
            ShapeError: a perturbation that does not fit the tensor.
        """
        del place
        if delta.shape != x.shape:
            raise ShapeError(
                f"expected a perturbation of {modality!r} of shape {tuple(x.shape)}, got {tuple(delta.shape)}; "
                "make it for this very batch"
            )
        return (x + delta).to(x.dtype)
