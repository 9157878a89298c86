"""PGD: moves by gradients of the perturbation alone, then one pass that parameters learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from advvl.checks import flag, is_choice
from advvl.errors import ConfigurationError
from advvl.maximizers.base import AscentState, InnerMaximizer, Order, check_count, check_order, turns_of
from advvl.maximizers.probes import Probe, Probes
from advvl.maximizers.rows import Best, pick, verdicts_of
from advvl.perturbers.base import Memory, Perturber
from advvl.perturbers.paired import Paired


@dataclass(frozen=True)
class PGD(InnerMaximizer):
    """Makes S moves by gradients of the perturbation alone, then runs one pass that parameters learn from.

    Arguments:
        steps: moves, S.
        modalities: moved together, or each alone with a separate end pass, weighted 1/modalities.
        keep: end at the last perturbation, or for each row at the one with the highest task loss, whatever else is climbed
            (one more forward).
        early_stop: a row that is no longer classified correctly stops moving.

    Source: Madry et al., ICLR 2018; early stopping as in the MNIST code of Wong et al., ICLR 2020.

    Raises:
        ConfigurationError: steps below 1; `early_stop` where nothing judges; `keep="best"` without a loss per row;
            either with `Paired`.
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

    def check(self, perturber: Perturber) -> None:
        if isinstance(perturber, Paired) and (self.keep == "best" or self.early_stop):
            raise ConfigurationError(
                "expected keep='last' without early_stop, got rows that share a perturbation, of which none can choose; "
                "leave both out"
            )

    def lessons(self, perturber: Perturber) -> int:
        return len(turns_of(perturber, self.modalities))

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        turns = turns_of(perturber, self.modalities)
        ends: dict[str, Tensor] = {}
        for turn in turns:
            starts = perturber.starts()
            deltas: Mapping[str, Any] = {modality: starts[modality] for modality in turn}
            best = Best()
            memory: Memory = {}
            for _ in range(self.steps):
                feedback = yield Probe(deltas)
                if self.keep == "best":
                    best.see(feedback)
                deltas, memory = feedback.move(perturber, memory)
                if self.early_stop:
                    deltas = pick(verdicts_of(feedback, "stop early by"), deltas, feedback.deltas, feedback.places)
            if self.keep == "best":
                best.see((yield Probe(deltas, delta_gradients=False)))
                deltas = best.deltas
            feedback = yield Probe(deltas, weight=1 / len(turns), delta_gradients=False, update=turn == turns[-1])
            ends.update(feedback.deltas)
        return ends
