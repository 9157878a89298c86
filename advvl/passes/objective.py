"""Objectives: the weighted sum that a pass climbs or teaches, and its value on one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from advvl.adapters.base import Outputs
from advvl.adapters.injection import Batch
from advvl.checks import is_number
from advvl.errors import ConfigurationError, ShapeError

Loss = Callable[[Outputs, Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of a pass's task loss and of its regularisers' penalties.

    VILLA climbs and teaches `Objective()`; TRADES climbs `Objective(task=0)`, the penalty alone.

    Arguments:
        task: weight of the task loss; 0: the loss is not computed.
        penalty: weight of the regularisers' penalties, over their own weights; 0: they are not computed.
        loss: from outputs and batch to a scalar or one loss per row `(B,)`; replaces the step's own.

    Raises:
        ConfigurationError: a weight that is negative or not finite; both of them 0.
    """

    task: float = 1.0
    penalty: float = 1.0
    loss: Loss | None = None

    def __post_init__(self) -> None:
        for name in ("task", "penalty"):
            weight = getattr(self, name)
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ConfigurationError(
                    f"expected the weight {name} to be a finite number of 0 or more, got {weight!r}"
                )
        if not self.task and not self.penalty:
            raise ConfigurationError("expected a task or a penalty above 0, got an objective of neither")
        if self.loss is not None and not callable(self.loss):
            raise ConfigurationError(f"expected loss as a function of outputs and batch, got {self.loss!r}")


@dataclass(frozen=True)
class Value:
    """An objective on one pass; every tensor holds its graph.

    Arguments:
        objective: the weights of the parts.
        task, penalty: the two parts, scalars, unweighted; None where they are not computed.
        losses: the task loss per row `(B,)`, or None where it is a single number or is not computed.
    """

    objective: Objective
    task: Tensor | None = None
    penalty: Tensor | None = None
    losses: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The weighted sum of the parts."""
        parts = (self.objective.task, self.task), (self.objective.penalty, self.penalty)
        found = [part if weight == 1 else weight * part for weight, part in parts if part is not None]
        if not found:
            raise ConfigurationError("expected a task loss or a regulariser in the objective of a pass, got neither")
        return total(found)


def total(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def checked_loss(loss: object) -> Tensor:
    """The loss that a caller's function gave, if it is a scalar or one per row.

    Raises:
        ShapeError: it is neither.
    """
    if not isinstance(loss, Tensor) or loss.ndim > 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError(
            f"expected a loss as a scalar tensor or one per row (B,), got {got}; reduce the other axes, without item"
        )
    return loss


def checked_penalty(penalty: object, regularizer: object) -> Tensor:
    """The penalty that a regulariser gave, if it is a scalar.

    Raises:
        ConfigurationError: it is none.
    """
    if not isinstance(penalty, Tensor) or penalty.ndim:
        got = tuple(penalty.shape) if isinstance(penalty, Tensor) else type(penalty).__name__
        raise ConfigurationError(
            f"expected a scalar tensor from {type(regularizer).__name__}, got {got}; reduce over the rows in it"
        )
    return penalty
