"""A perturbation that two rows share: of one prompt with two answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.errors import ShapeError
from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.places import Place
from advvl.perturbers.starts import Start


@dataclass(frozen=True)
class Paired(Perturber):
    """As `inner`, but row i of a batch's second half has the same perturbation as row i of its first half.

    The gradient of either is the sum over both rows. The real positions of both have to be the same: those of a prompt whose
    two answers are padded on the right.
    """

    inner: Perturber

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.inner.modalities

    def starts(self) -> dict[str, Start]:
        return self.inner.starts()

    def box(self, modality: str, x: Tensor) -> tuple[float | Tensor, float | Tensor] | None:
        return self.inner.box(modality, x)

    def unit(self, modality: str, place: Place) -> Tensor | float:
        return self.inner.unit(modality, place)

    @property
    def additive(self) -> bool:
        return self.inner.additive

    def for_attack(self) -> Paired:
        return Paired(self.inner.for_attack())

    def for_part(self, weight: float) -> Paired:
        return Paired(self.inner.for_part(weight))

    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        """The first perturbation, the same in both halves; reads from the device.

        Raises:
            ShapeError: an odd number of rows, packed rows, or halves whose real positions differ.
        """
        rows = len(place.x)
        if rows % 2 or place.owners is not None:
            raise ShapeError(f"expected two halves of rows at the site of {modality!r}, got {rows} rows; pair them")
        if place.mask is not None:
            first, second = place.mask.chunk(2) if rows else (place.mask, place.mask)
            differing = (first != second).flatten(1).any(1).nonzero().flatten().tolist()
            if differing:
                raise ShapeError(
                    f"expected both halves of {modality!r} real at the same positions, got others in rows {differing}; "
                    "pad answers on the right"
                )
        return _mirrored(self.inner.begin(modality, start, place, generator))

    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        moved, kept = self.inner.move(deltas, gradients, places, memory)
        return Moved({modality: _mirrored(delta) for modality, delta in moved.items()}, kept)

    def norms(self, deltas: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        return self.inner.norms(deltas, places)

    def apply(self, modality: str, place: Place, x: Tensor, delta: Tensor) -> Tensor:
        first, second = delta.chunk(2) if len(delta) else (delta, delta)
        shared = first + (second - second.detach())  # adds nothing, and each half has the gradient of both
        return self.inner.apply(modality, place, x, torch.cat([shared, shared]))


def _mirrored(delta: Tensor) -> Tensor:
    """The first half's rows, twice."""
    first = delta[: len(delta) // 2]
    return torch.cat([first, first])
