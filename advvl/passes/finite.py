"""Rows that a pass could not move, with gradients of zero or not finite; gathered on the device, read at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from advvl.errors import NonFiniteError, more
from advvl.perturbers.places import Place


class RowCheck:
    """The rows of each modality whose gradients moved nothing, over all passes seen.

    Attributes:
        nonfinite: modality to the rows `(B,)`, bool, whose gradient was not finite in some pass.
        still: modality to the rows with real positions whose gradient was zero or not finite in every pass.
        moved: modality to the rows that some gradient moved.
        weights: the weights' gradients were finite in every pass that moved them, a scalar; None: none moved them.
    """

    def __init__(self) -> None:
        self.nonfinite: dict[str, Tensor] = {}
        self.still: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}
        self.weights: Tensor | None = None

    def see(self, gradients: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
        """Record the gradients themselves, because a perturber of the user's own may change what it moves along."""
        for modality, gradient in gradients.items():
            place = places[modality]
            largest, mask = _largest(place.packed(place.masked(gradient))), place.packed_mask
            bad = ~largest.isfinite()
            still = bad | (largest == 0)
            if place.groups is not None:  # a sample moves as a whole
                moved = place.by_sample((~still).long())
                still = moved[place.groups] == 0
            moving = ~still
            if mask is not None:
                still = still & mask.flatten(1).any(1) if mask.ndim > 1 else still & mask
            first = modality not in self.still
            self.nonfinite[modality] = bad if first else self.nonfinite[modality] | bad
            self.still[modality] = still if first else self.still[modality] & still
            self.moved[modality] = moving if first else self.moved[modality] | moving

    def see_weights(self, finite: Tensor) -> None:
        """Record whether the gradients that weights move along are finite, a scalar."""
        self.weights = finite if self.weights is None else self.weights & finite.to(self.weights.device)

    def swallowed(self, effective: Mapping[str, Tensor]) -> None:
        """Count rows as still if the cast to half precision left nothing of their perturbation, `effective` `(B,)`."""
        for modality, share in effective.items():
            if modality in self.still and share.shape == self.still[modality].shape:
                none = (share == 0) & self.moved[modality]
                self.still[modality] = self.still[modality] | none
                self.moved[modality] = self.moved[modality] & ~none

    def pinned(self, units: Mapping[str, Tensor | float], places: Mapping[str, Place]) -> None:
        """Count rows as still if their ball has no extent, because the embeddings that it is measured in are zero."""
        for modality, unit in units.items():
            if isinstance(unit, Tensor) and modality in self.still:
                place = places[modality]
                room = _largest(place.packed(place.masked(torch.ones_like(place.x) * unit)))
                none = (room == 0) & self.moved[modality]
                self.still[modality] = self.still[modality] | none
                self.moved[modality] = self.moved[modality] & ~none

    def check(self, loss: Tensor | None) -> None:
        """Raise NonFiniteError if anything was not finite, naming modality and rows; one read from the device."""
        if loss is None:
            return
        flags = {modality: bad.any() for modality, bad in self.nonfinite.items()}
        still = [] if self.weights is None else [~self.weights]
        broken = torch.stack([~loss.isfinite(), *(flag.to(loss.device) for flag in (*flags.values(), *still))])
        if not broken.any():  # the one read
            return
        rows = {modality: bad.nonzero().flatten().tolist() for modality, bad in self.nonfinite.items() if bad.any()}
        where = "; ".join(f"the gradient of the {m!r} perturbation in rows {_some(r)}" for m, r in rows.items())
        found = [where] if where else []
        found += [] if self.weights is None or self.weights else ["the gradient that weights move along"]
        found += [] if loss.isfinite() else [f"loss {float(loss)}"]
        raise NonFiniteError(
            f"expected finite losses and gradients, got {'; '.join(found)}; .grad is unusable: zero it, and see that "
            f"the batch is finite{more('not-finite')}"
        )


def _largest(gradient: Tensor) -> Tensor:
    """The largest magnitude in each row `(B,)`; NaN if the row has a NaN."""
    rows = gradient.flatten(1)
    return torch.linalg.vector_norm(rows, torch.inf, dim=1) if rows.shape[1] else rows.new_zeros(len(rows))


def _some(rows: list[int]) -> str:
    return f"{rows[:20]}" + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
