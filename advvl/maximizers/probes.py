"""What inner maximisers and the code that runs passes say to each other: probes asked for, feedback sent.

A maximiser is driven so:

    probes = FreeLB(steps=3).probes(perturber)
    probe = next(probes)                  # run a pass at probe.deltas
    probe = probes.send(feedback)         # and so on, until StopIteration carries the final deltas
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from advvl.ops import Stepped
from advvl.perturbers.balls import Place
from advvl.perturbers.base import Perturber
from advvl.perturbers.starts import Start


@dataclass(frozen=True)
class Probe:
    """A pass that a maximiser asks for.

    Arguments:
        deltas: the perturbation of each modality, or the start to make it from; a modality not named stays clean.
        apart: each modality in a pass of its own, the others clean; the passes do not depend on each other, so that
            the driver may run them as one batch.
        weight: of a pass's loss in the parameter gradient; 0: no parameter gradient is wanted.
        delta_gradients: whether the gradients of the perturbations are wanted.
        update: the parameter gradients are complete after this: reduce them over processes, and update.
    """

    deltas: Mapping[str, Tensor | Start]
    weight: float = 0.0
    delta_gradients: bool = True
    update: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Feedback:
    """What a pass gave; it depends neither on the probe's weight nor on any loss scale.

    Arguments:
        deltas: the perturbations of the pass, starts made.
        gradients: of the pass's own loss with respect to each perturbation; empty if not wanted.
        places: where each perturbation lives.
        losses: `(B,)`, one a row, or None where the loss is a single number; of the last of several passes.
        correct: `(B,)` bool, or None where nothing judges; of the last of several passes.
        stepped: filled in by `move`; the driver reads norms and flags from it.
    """

    deltas: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    places: Mapping[str, Place]
    losses: Tensor | None = None
    correct: Tensor | None = None
    stepped: dict[str, Stepped] = field(default_factory=dict)

    def move(self, perturber: Perturber) -> dict[str, Tensor]:
        """The perturbations after one ascent step along these gradients."""
        self.stepped.update(perturber.move(self.deltas, self.gradients, self.places))
        return {modality: stepped.delta for modality, stepped in self.stepped.items()}


def merged(answers: Sequence[Feedback]) -> Feedback:
    """What several passes gave, as one."""
    deltas: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    for answer in answers:
        deltas |= answer.deltas
        gradients |= answer.gradients
        places |= answer.places
    return Feedback(deltas, gradients, places, answers[-1].losses, answers[-1].correct)


Probes = Generator[Probe, Feedback, dict[str, Tensor]]
