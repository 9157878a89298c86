"""The perturber of methods that perturb no input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.places import Place
from advvl.perturbers.starts import Start


@dataclass(frozen=True)
class Unperturbed(Perturber):
    """No modality at all: with `FreeLB(1)` a step is one clean pass.

    For methods whose penalty compares clean predictions with other ones (R-Drop, circuit breakers), or that perturb
    weights alone (SAM).
    """

    @property
    def modalities(self) -> tuple[str, ...]:
        return ()

    def starts(self) -> dict[str, Start]:
        return {}

    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        raise AssertionError(f"no pass perturbs {modality!r}")

    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        del gradients, places
        return Moved(dict(deltas), memory)
