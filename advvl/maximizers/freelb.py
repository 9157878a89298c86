"""FreeLB: K passes whose parameter gradients add up while the perturbation climbs."""

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


@dataclass(frozen=True)
class FreeLB(InnerMaximizer):
    """Runs K passes whose parameter gradients add up, weighted 1/K, with an ascent step between consecutive passes.

    K passes make K−1 moves: the last perturbation is used but not moved. With modalities in turn (VILLA's "alter") a
    step is one pass for each modality, weighted 1/(K·modalities). Source: FreeLB (Zhu et al., ICLR 2020), VILLA's
    released loop.

    Raises:
        ConfigurationError: steps below 1; steps of 1 with a start at zero, which would perturb nothing.
    """

    steps: int = 3
    modalities: Order = "together"

    one_backward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_order(self.modalities)

    @property
    def moves(self) -> int:
        return self.steps - 1

    def lessons(self, perturber: Perturber) -> int:
        return self.steps * len(turns_of(perturber, self.modalities))

    def check(self, perturber: Perturber) -> None:
        if self.steps == 1 and some_pass_starts_at_zero(perturber, self.modalities):
            raise ConfigurationError(
                "expected FreeLB(steps=2) or more, or a start that is not zero, got steps=1 with Zero(): "
                "its one pass would be clean"
            )

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        turns = turns_of(perturber, self.modalities)
        weight = 1 / (self.steps * len(turns))
        deltas: dict[str, Any] = dict(perturber.starts())
        memory: Memory = {}
        for step in range(self.steps):
            last = step == self.steps - 1
            for turn in turns:
                probe = {modality: deltas[modality] for modality in turn}
                update = last and turn == turns[-1]
                feedback = yield Probe(probe, weight, delta_gradients=not last, update=update)
                if last:
                    deltas |= feedback.deltas
                else:
                    moved, memory = feedback.move(perturber, memory)
                    deltas |= moved
        return deltas
