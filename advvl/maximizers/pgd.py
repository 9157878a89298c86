"""PGD: moves by gradients of the perturbation alone, then one pass to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from advvl.checks import flag, is_choice
from advvl.errors import ConfigurationError, ShapeError
from advvl.maximizers.base import AscentState, InnerMaximizer, Order, check_count, check_order, turns_of
from advvl.maximizers.probes import Feedback, Probe, Probes
from advvl.perturbers.base import Memory, Perturber
from advvl.perturbers.places import Place


@dataclass(frozen=True)
class PGD(InnerMaximizer):
    """S moves by gradients of the perturbation alone, then one pass at the end of them, which training learns from.

    Arguments:
        steps: moves, S.
        modalities: moved together, or each alone with an end pass of its own, weighted 1/modalities.
        keep: end at the last perturbation, or for each row at the one of the highest loss (one more forward).
        early_stop: a row that is no longer classified correctly moves no further.

    Source: Madry et al., ICLR 2018; early stopping as in the MNIST code of Wong et al., ICLR 2020.

    Raises:
        ConfigurationError: steps below 1; `early_stop` where nothing judges; `keep="best"` without a loss per row.
    """

    steps: int
    modalities: Order = "together"
    keep: Literal["last", "best"] = "last"
    early_stop: bool = False

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_order(self.modalities)
        flag(self, "early_stop")
        if not is_choice(self.keep, ("last", "best")):
            raise ConfigurationError(f"expected keep to be 'last' or 'best', got {self.keep!r}")

    @property
    def moves(self) -> int:
        return self.steps

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        turns = turns_of(perturber, self.modalities)
        ends: dict[str, Tensor] = {}
        for turn in turns:
            starts = perturber.starts()
            deltas: Mapping[str, Any] = {modality: starts[modality] for modality in turn}
            best = _Best()
            memory: Memory = {}
            for _ in range(self.steps):
                feedback = yield Probe(deltas)
                if self.keep == "best":
                    best.see(feedback)
                deltas, memory = feedback.move(perturber, memory)
                if self.early_stop:
                    deltas = _rows(_correct(feedback), deltas, feedback.deltas, feedback.places)
            if self.keep == "best":
                best.see((yield Probe(deltas, delta_gradients=False)))
                deltas = best.deltas
            feedback = yield Probe(deltas, weight=1 / len(turns), delta_gradients=False, update=turn == turns[-1])
            ends.update(feedback.deltas)
        return ends


class _Best:
    """For each row, the perturbation of the highest loss seen; NaN is below every other."""

    deltas: Mapping[str, Tensor]
    losses: Tensor | None = None

    def see(self, feedback: Feedback) -> None:
        if feedback.losses is None:
            raise ConfigurationError(
                "expected a loss for each row to keep the best of, got none; give loss=… with reduction='none', climb a task"
            )
        if self.losses is None:
            self.losses, self.deltas = feedback.losses, feedback.deltas
            return
        better = (feedback.losses > self.losses) | (self.losses.isnan() & ~feedback.losses.isnan())
        self.deltas = _rows(better, feedback.deltas, self.deltas, feedback.places)
        self.losses = torch.where(better, feedback.losses, self.losses)


def _rows(
    chosen: Tensor, yes: Mapping[str, Tensor], no: Mapping[str, Tensor], places: Mapping[str, Place]
) -> dict[str, Tensor]:
    """Row by row, the perturbations of `yes` where `chosen` `(B,)`, else those of `no`."""
    picked = {}
    for modality, delta in yes.items():
        place = places[modality]
        owners, rows = place.owners, chosen
        if owners is not None:
            if owners.numel() and int(owners.max()) >= len(chosen):
                raise ShapeError(
                    f"expected one loss or verdict for each sample of {modality!r}, got {len(chosen)}, and rows of sample "
                    f"{int(owners.max())}; give a loss per sample, or move all rows"
                )
            rows = chosen[owners]
        packed = place.packed(delta)
        if rows.shape != packed.shape[:1]:
            raise ShapeError(
                f"expected one loss or verdict for each of the {packed.shape[0]} rows of {modality!r}, got "
                f"{tuple(rows.shape)}; give Site(…, examples=…) or rows=…, or move all rows"
            )
        rows = rows.reshape(-1, *[1] * (packed.ndim - 1))
        picked[modality] = torch.where(rows, packed, place.packed(no[modality])).view_as(delta)
    return picked


def _correct(feedback: Feedback) -> Tensor:
    if feedback.correct is None:
        raise ConfigurationError(
            "expected correct=… to stop early by, from (outputs, batch) to (B,) bool, got None; give the attack one"
        )
    return feedback.correct
