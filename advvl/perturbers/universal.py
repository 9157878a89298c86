"""One perturbation for all samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.places import Place
from advvl.perturbers.starts import Start
from advvl.runtime.processes import check_agreement, first_process, process_count, process_mean


class UniversalPerturber(Perturber):
    """One perturbation `(1, T, D)` of each modality for the whole batch, added at every sample's real positions.

    Its gradient is the sum over the samples, and the mean over the processes that train together, in all of which the
    sites need one length T. Ball, step and start are as in `EmbeddingPerturber`, over the positions that are real in any
    sample; the box clips the perturbed tensor itself. With `FreeAT(1)`, which carries it from batch to batch, this is
    Shafahi et al., "Universal Adversarial Training", AAAI 2020; an `Attack` finds one for its batch.

    Raises:
        ConfigurationError: no modality, something that is no `Ascent`, or a ball with `relative`, which needs a sample.
    """

    def __init__(self, **ascents: Ascent) -> None:
        self._given = EmbeddingPerturber(**ascents)
        for modality, ascent in ascents.items():
            if getattr(ascent.ball, "relative", False):
                raise ConfigurationError(
                    f"expected a ball of {modality!r} without relative, which needs a sample to measure, got {ascent.ball!r}"
                )
        # stepped without the boxes, which differ from sample to sample: `apply` keeps to them
        self._free = EmbeddingPerturber(**{modality: replace(ascent, box=None) for modality, ascent in ascents.items()})

    def __repr__(self) -> str:
        return repr(self._given).replace("Embedding", "Universal", 1)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self._given.modalities

    def starts(self) -> dict[str, Start]:
        return self._given.starts()

    def box(self, modality: str, x: Tensor) -> tuple[float | Tensor, float | Tensor] | None:
        return self._given.box(modality, x)

    def for_attack(self) -> UniversalPerturber:
        return UniversalPerturber(**self._given.for_attack().ascents)

    def for_part(self, weight: float) -> UniversalPerturber:
        return UniversalPerturber(**self._given.for_part(weight).ascents)

    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        if place.segments is not None:
            raise ShapeError(
                f"expected a tensor (B, T, …) of {modality!r} to share a perturbation, got one of packed rows; "
                "perturb a site with a batch axis"
            )
        check_agreement(f"the length of {modality!r}", tuple(place.x.shape[1:]))
        return first_process(self._free.begin(modality, start, _shared_place(place), generator))

    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        means = {modality: process_mean(gradient) for modality, gradient in gradients.items()}
        return self._free.move(deltas, means, {m: _shared_place(places[m]) for m in means}, memory)

    def norms(self, deltas: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        return self._free.norms(deltas, {modality: Place(delta) for modality, delta in deltas.items()})

    def apply(self, modality: str, place: Place, x: Tensor, delta: Tensor) -> Tensor:
        if delta.shape != (1, *x.shape[1:]):
            raise ShapeError(
                f"expected a perturbation of {modality!r} of shape {(1, *x.shape[1:])} for all samples, got "
                f"{tuple(delta.shape)}; make it for tensors of this length"
            )
        moved, box, real = x + delta, self.box(modality, x), place.real(x.ndim)
        moved = (moved if box is None else moved.clamp(*box)).to(x.dtype)  # type: ignore[arg-type]
        return moved if real is None else torch.where(real, moved, x)


def _shared_place(place: Place) -> Place:
    """The place of the perturbation itself: one row, real where any sample's is, in any process."""
    one = place.x[:1] if len(place.x) else place.x.new_zeros(1, *place.x.shape[1:])
    if place.mask is None:
        return Place(one)
    mask = place.mask.any(0, keepdim=True)
    return Place(one, process_mean(mask.float()) > 0 if process_count() > 1 else mask)
