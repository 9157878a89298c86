"""Expectation over transformation: another maximiser that averages several passes of a model with random outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.maximizers.base import AscentState, InnerMaximizer, check_count
from advvl.maximizers.probes import Feedback, Probe, Probes
from advvl.perturbers.base import Perturber


@dataclass(frozen=True)
class EOT(InnerMaximizer):
    """Runs `maximizer` with gradients and losses averaged over several passes.

    Use it for a model whose outputs are random even in eval mode. A single gradient climbs one draw of the model; the
    mean climbs the expected loss. A row counts as correct if at least half of the draws are. A pass that parameters
    learn from stays a single pass.

    Arguments:
        maximizer: one that teaches only at its end, such as `PGD(20)` or `AutoPGD(100)`.
        draws: passes for each pass of the maximiser.

    Source: Athalye et al., "Synthesizing robust adversarial examples", ICML 2018; against random defences, Athalye et al.,
    "Obfuscated gradients give a false sense of security", ICML 2018.

    Raises:
        ConfigurationError: fewer than one draw, or a maximiser that teaches on its way.

    Example:
        `NamedAttack(name="EOT", maximizer=EOT(PGD(20), draws=10))`
    """

    maximizer: InnerMaximizer
    draws: int

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        if not isinstance(self.maximizer, InnerMaximizer) or self.maximizer.one_backward:
            raise ConfigurationError(
                f"expected a maximiser that teaches at its end alone, got {self.maximizer!r}; take PGD or AutoPGD"
            )

    @property
    def gradients(self) -> bool:
        return self.maximizer.gradients

    @property
    def updates(self) -> int:
        return self.maximizer.updates

    @property
    def moves(self) -> int | None:
        return self.maximizer.moves

    def lessons(self, perturber: Perturber) -> int:
        return self.maximizer.lessons(perturber)

    def check(self, perturber: Perturber) -> None:
        self.maximizer.check(perturber)

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        with closing(self.maximizer.probes(perturber, generator=generator, state=state)) as inner:
            probe = next(inner)
            while True:
                seen = [(yield probe)]
                if not probe.weight:
                    again = Probe(seen[0].deltas, delta_gradients=probe.delta_gradients)  # a start is made by now
                    for _ in range(self.draws - 1):
                        seen.append((yield again))
                try:
                    probe = inner.send(_mean(seen))
                except StopIteration as end:
                    deltas: Mapping[str, Tensor] = end.value
                    return deltas


def _mean(seen: Sequence[Feedback]) -> Feedback:
    first, losses = seen[0], [feedback.losses for feedback in seen if feedback.losses is not None]
    verdicts = [feedback.correct for feedback in seen if feedback.correct is not None]
    return replace(
        first,
        gradients={
            modality: torch.stack([feedback.gradients[modality] for feedback in seen]).mean(dim=0)
            for modality in first.gradients
        },
        losses=torch.stack(losses).mean(dim=0) if losses else None,
        correct=torch.stack(verdicts).double().mean(dim=0) >= 0.5 if verdicts else None,
    )
