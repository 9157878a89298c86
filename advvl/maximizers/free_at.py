"""Free adversarial training: every backward both updates the parameters and moves the perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from advvl.errors import ConfigurationError
from advvl.maximizers.base import (
    AscentState,
    InnerMaximizer,
    Order,
    check_count,
    check_order,
    some_pass_starts_at_zero,
    turns_of,
)
from advvl.maximizers.probes import Probe, Probes
from advvl.perturbers.base import Memory, Perturber
from advvl.perturbers.starts import Carried


@dataclass(frozen=True)
class FreeAT(InnerMaximizer):
    """Replays each batch m times; the backward of every replay both updates the parameters and moves the perturbation.

    Arguments:
        replays: m, passes and parameter updates per batch.
        modalities: together, or in turn with one update after the last of them.
        carry: keep the perturbation across batches in `state`, moved after every replay (Shafahi et al., NeurIPS 2019,
            as released). False: the NLP variant of FreeLB's code, with a new start in each batch and the loss divided
            by m+1.

    Raises:
        ConfigurationError: replays below 1; one replay that would be clean; `carry` without a state.
    """

    replays: int
    modalities: Order = "together"
    carry: bool = True

    one_backward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("replays", self.replays)
        check_order(self.modalities)

    @property
    def updates(self) -> int:
        return self.replays

    def lessons(self, perturber: Perturber) -> int:
        return len(turns_of(perturber, self.modalities))

    def check(self, perturber: Perturber) -> None:
        if self.replays == 1 and not self.carry and some_pass_starts_at_zero(perturber, self.modalities):
            raise ConfigurationError(
                "expected FreeAT(replays=2) or more, carry=True, or another start than Zero(), got one pass, which would "
                "be clean"
            )

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator
        if self.carry and state is None:
            raise ConfigurationError(
                "expected state=AscentState() for FreeAT(carry=True), got None; pass the same one to every step"
            )
        turns = turns_of(perturber, self.modalities)
        carried = {} if state is None or not self.carry else state.deltas
        own = {m: Carried(delta) for m, delta in carried.items() if m in perturber.modalities}
        deltas: dict[str, Any] = perturber.starts() | own
        memory: Memory = {}
        weight = 1 / len(turns) if self.carry else 1 / ((self.replays + 1) * len(turns))
        for replay in range(self.replays):
            moves = self.carry or replay < self.replays - 1
            for turn in turns:
                probe = {modality: deltas[modality] for modality in turn}
                feedback = yield Probe(probe, weight, delta_gradients=moves, update=turn == turns[-1])
                if moves:
                    moved, memory = feedback.move(perturber, memory)
                    deltas |= moved
                else:
                    deltas |= feedback.deltas
        if self.carry and state is not None:
            state.deltas = {**state.deltas, **deltas}  # other methods' modalities stay
        return deltas
