"""The messages between inner maximisers and the code that runs passes: probes and feedback.

A maximiser is driven as follows:

    probes = FreeLB(steps=3).probes(perturber)
    probe = next(probes)                  # run a pass at probe.deltas
    probe = probes.send(feedback)         # and so on, until StopIteration carries the final deltas
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from torch import Tensor

from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.places import Place
from advvl.perturbers.starts import Start


@dataclass(frozen=True)
class Probe:
    """One pass that a maximiser requests.

    Arguments:
        deltas: the perturbation of each modality, or the start to make it from; a modality not named stays clean.
        weight: of the pass's loss in the parameter gradient; 0: no parameter gradient is needed.
        delta_gradients: whether the gradients of the perturbations are needed.
        update: the parameter gradients are complete after this pass: reduce them over processes, and update.
    """

    deltas: Mapping[str, Tensor | Start]
    weight: float = 0.0
    delta_gradients: bool = True
    update: bool = False


@dataclass(frozen=True)
class Feedback:
    """The result of one pass; it depends neither on the probe's weight nor on any loss scale.

    Arguments:
        deltas: the perturbations of the pass, starts made.
        gradients: of the pass's own loss with respect to each perturbation; empty if not requested.
        places: where each perturbation lives.
        losses: `(B,)`, one per row, or None where the loss is a single number.
        correct: `(B,)` bool, or None where nothing judges.
    """

    deltas: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    places: Mapping[str, Place]
    losses: Tensor | None = None
    correct: Tensor | None = None

    def move(self, perturber: Perturber, memory: Memory | None = None) -> Moved:
        """Take one ascent step along these gradients; see `Perturber.move`."""
        return perturber.move(self.deltas, self.gradients, self.places, memory or {})


Probes = Generator[Probe, Feedback, Mapping[str, Tensor]]
