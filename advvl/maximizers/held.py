"""Several parameter updates at the perturbation that another maximiser found."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advvl.errors import ConfigurationError
from advvl.maximizers.base import AscentState, InnerMaximizer, check_count
from advvl.maximizers.probes import Probe, Probes
from advvl.perturbers.base import Perturber


@dataclass(frozen=True)
class Held(InnerMaximizer):
    """Holds the final perturbation of `maximizer` for M parameter updates; the first update is the maximiser's own.

    Arguments:
        maximizer: one that teaches only at its end, such as `PGD(16)`, with modalities together.
        count: M, updates per batch.

    Source: latent adversarial training (Sheshadri et al., 2024), 16 moves and 4 updates.

    Raises:
        ConfigurationError: a count below 1, or a maximiser that teaches on its way.
    """

    maximizer: InnerMaximizer
    count: int

    def __post_init__(self) -> None:
        check_count("count", self.count)
        if not isinstance(self.maximizer, InnerMaximizer) or self.maximizer.one_backward:
            raise ConfigurationError(_teaches_early(self.maximizer))

    @property
    def gradients(self) -> bool:
        return self.maximizer.gradients

    @property
    def updates(self) -> int:
        return self.maximizer.updates + self.count - 1

    @property
    def moves(self) -> int | None:
        return self.maximizer.moves

    def check(self, perturber: Perturber) -> None:
        if self.maximizer.lessons(perturber) > 1:
            raise ConfigurationError(_teaches_early(self.maximizer))
        self.maximizer.check(perturber)

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        deltas = yield from self.maximizer.probes(perturber, generator=generator, state=state)
        for _ in range(self.count - 1):
            yield Probe(deltas, weight=1.0, delta_gradients=False, update=True)
        return deltas


def _teaches_early(maximizer: object) -> str:
    return f"expected a maximiser that teaches at its end alone, got {maximizer!r}; take PGD, modalities together"
