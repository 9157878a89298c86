"""Values of examples (numbers, choices, best points), for perturbations of which an example may have several rows.

Legend: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from advvl.errors import ConfigurationError, ShapeError
from advvl.maximizers.probes import Feedback
from advvl.perturbers.places import Place


class Best:
    """For each example, the perturbation of the highest loss seen; NaN is below every other.

    Arguments:
        flips_first: a perturbation that flips the example, where verdicts are there, is above any that does not.
    """

    deltas: Mapping[str, Tensor]
    losses: Tensor
    correct: Tensor | None = None

    def __init__(self, *, flips_first: bool = False) -> None:
        self.flips_first, self.empty = flips_first, True

    def see(self, feedback: Feedback) -> Tensor:
        """Take a pass into account, and return the examples `(B,)`, bool, in which it is the best so far."""
        losses, correct = losses_of(feedback), feedback.correct if self.flips_first else None
        if self.empty:
            self.empty = False
            self.losses, self.deltas, self.correct = losses, feedback.deltas, correct
            return torch.ones_like(losses, dtype=torch.bool)
        better = (losses > self.losses) | (self.losses.isnan() & ~losses.isnan())
        if correct is not None and self.correct is not None:
            better = torch.where(correct == self.correct, better, self.correct)
            self.correct = self.correct & correct
        self.deltas = pick(better, feedback.deltas, self.deltas, feedback.places)
        self.losses = torch.where(better, losses, self.losses)
        return better


def losses_of(feedback: Feedback) -> Tensor:
    if feedback.losses is None:
        raise ConfigurationError(
            "expected a loss for each row to keep the best of, got none; give loss=… with reduction='none', and climb it"
        )
    return feedback.losses


def verdicts_of(feedback: Feedback, purpose: str) -> Tensor:
    if feedback.correct is None:
        raise ConfigurationError(
            f"expected correct=… to {purpose}, from (outputs, batch) to (B,) bool, got None; give the attack one"
        )
    return feedback.correct


def pick(
    chosen: Tensor, yes: Mapping[str, Tensor], no: Mapping[str, Tensor], places: Mapping[str, Place]
) -> dict[str, Tensor]:
    """Take, of each example, the tensors of `yes` where `chosen` `(B,)`, else those of `no`."""
    return {
        modality: torch.where(spread(chosen, modality, one, places[modality]), one, no[modality])
        for modality, one in yes.items()
    }


def spread(values: Tensor, modality: str, delta: Tensor, place: Place) -> Tensor:
    """Spread a value for each example `(B,)` over its rows, broadcastable against the perturbation.

    Raises:
        ShapeError: there is none for some row.
    """
    rows, lead, owners = values, delta.shape[:1], place.owners
    if owners is not None:
        if owners.numel() and int(owners.max()) >= len(values):
            raise ShapeError(
                f"expected one loss or verdict for each sample of {modality!r}, got {len(values)}, and rows of sample "
                f"{int(owners.max())}; give a loss per sample, or move all rows"
            )
        rows = values[owners]
        lead = lead if place.segments is None else place.segments.shape
    if rows.shape != (lead.numel(),):
        raise ShapeError(
            f"expected one loss or verdict for each of the {lead.numel()} rows of {modality!r}, got "
            f"{tuple(rows.shape)}; give Site(…, examples=…) or rows=…, or move all rows"
        )
    return rows.reshape(*lead, *[1] * (delta.ndim - len(lead)))


def gather(values: Tensor, place: Place, like: Tensor, how: Literal["sum", "amax"]) -> Tensor:
    """Reduce values of the shape of a perturbation, or of leading axes of it, to one for each example, as `like` `(B,)`."""
    packed = place.packed(values).unsqueeze(-1).flatten(1)
    rows = (packed.sum(1) if how == "sum" else packed.amax(1)).to(like.dtype)
    if place.owners is None:
        return rows
    return torch.zeros_like(like).scatter_reduce(0, place.owners, rows, how)
