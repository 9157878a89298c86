"""Records of passes, for inspection, and the objective that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from advvl.passes.objective import Value


@dataclass(frozen=True)
class PassTrace:
    """The record of one pass, for parity tests and inspection.

    Arguments:
        modalities: those perturbed; empty for the clean pass.
        weight: of the pass in the parameter gradient.
        logits, task_loss, regularization: of the pass, not multiplied by `weight`. None where there are none.
        deltas, gradients: of the perturbations, unscaled; gradients are of the pass's objective.
    """

    modalities: tuple[str, ...]
    weight: float
    logits: Tensor | None
    task_loss: Tensor | None
    regularization: Tensor | None
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


Trace = Callable[[PassTrace], object]


@dataclass
class Tally:
    """The taught objective so far, in its two parts."""

    task_loss: Tensor | None = None
    regularization: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """The whole objective; None before a pass with a weight."""
        return _plus(self.task_loss, self.regularization)

    def add(self, weight: float, value: Value) -> None:
        """Add a pass of this weight."""
        if weight:
            self.task_loss = _plus(self.task_loss, _times(weight * value.objective.task, value.task))
            self.regularization = _plus(self.regularization, _times(weight * value.objective.penalty, value.penalty))

    def add_penalty(self, penalty: Tensor) -> None:
        """Add a penalty that belongs to no perturbed pass."""
        self.regularization = _plus(self.regularization, penalty.detach())


def _times(weight: float, value: Tensor | None) -> Tensor | None:
    return None if value is None or not weight else weight * value.detach()


def _plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return total if term is None else term if total is None else total + term
