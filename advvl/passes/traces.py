"""What the passes of a round came to: the objective that they add up to, and each as it was, for whoever wants to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class PassTrace:
    """What one pass was: for parity tests and for looking inside.

    Arguments:
        modalities: those perturbed; empty for the clean pass.
        weight: of the pass in the parameter gradient.
        logits, task_loss, regularization: as they came out; unweighted by `weight`. None where there are none.
        deltas, gradients: of the perturbations, unscaled; gradients are of `task_loss + regularization`.
    """

    modalities: tuple[str, ...]
    weight: float
    logits: Tensor | None
    task_loss: Tensor
    regularization: Tensor | None
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


Trace = Callable[[PassTrace], object]


class Tally:
    """The objective so far, in its two parts; every pass is told to `trace` if there is one."""

    def __init__(self, trace: Trace | None) -> None:
        self.trace = trace
        self.task_loss: Tensor | None = None
        self.regularization: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """The whole objective; None before a pass with a weight."""
        if self.task_loss is None or self.regularization is None:
            return self.task_loss
        return self.task_loss + self.regularization

    def add(
        self,
        modalities: tuple[str, ...],
        weight: float,
        logits: Tensor | None,
        task: Tensor,
        penalty: Tensor | None,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """Count a pass in; see `PassTrace`."""
        if weight:
            self.task_loss = _plus(self.task_loss, weight * task.detach())
            if penalty is not None:
                self.regularization = _plus(self.regularization, weight * penalty.detach())
        if self.trace is not None:
            self.trace(
                PassTrace(
                    modalities,
                    weight,
                    None if logits is None else logits.detach(),
                    task.detach(),
                    None if penalty is None else penalty.detach(),
                    {modality: deltas[modality].detach() for modality in modalities},
                    {modality: gradients[modality].detach() for modality in modalities if modality in gradients},
                )
            )


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term
