"""Inner maximisers: they decide which passes to run, at which perturbations, and how to use the results.

A maximiser is a generator. It yields a `Probe`, a request for a pass, and receives a `Feedback`, the results of the
pass; at the end it returns the final perturbations. It never sees a model, so each maximiser is a few lines and is
tested without a model. The driver (`passes`, under `training` or `attacks`) closes the generator on any exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from advvl.checks import is_choice
from advvl.errors import ConfigurationError
from advvl.maximizers.probes import Probes
from advvl.perturbers.base import Perturber
from advvl.perturbers.starts import Zero

Order = Literal["together", "in turn"]


@dataclass(repr=False)
class AscentState:
    """The memory of a maximiser from batch to batch: free AT's perturbations, local to their process.

    Arguments:
        deltas: modality to its last perturbation, `(B, …)` of the last batch; empty before the first.
    """

    deltas: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"AscentState({ ({name: tuple(delta.shape) for name, delta in self.deltas.items()}) })"

    def state_dict(self) -> dict[str, Any]:
        """Return the entries for a checkpoint; the tensors are not copied."""
        return {"deltas": dict(self.deltas)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from `state_dict`.

        Raises:
            ConfigurationError: something else.
        """
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else None
        if keys != ["deltas"] or not isinstance(state["deltas"], Mapping):
            got = type(state).__name__ if keys is None else f"the keys {keys[:8]}"
            raise ConfigurationError(
                f"expected the state_dict() of an AscentState, {{'deltas': …}}, got {got}; "
                "give the entry of the checkpoint that holds it"
            )
        wrong = {name: type(delta).__name__ for name, delta in state["deltas"].items() if not isinstance(delta, Tensor)}
        if wrong:
            raise ConfigurationError(f"expected a tensor for each modality, got {wrong}; give what state_dict() gave")
        self.deltas = dict(state["deltas"])


class InnerMaximizer(ABC):
    """Requests passes, receives their feedback, and never sees the model.

    `one_backward` is True for a maximiser whose passes move perturbations and teach parameters by the same backward.
    """

    one_backward: ClassVar[bool] = False

    @property
    def gradients(self) -> bool:
        """True unless it asks for no gradients of perturbations, as a random search does."""
        return True

    @property
    def updates(self) -> int:
        """Parameter updates in one step."""
        return 1

    @property
    def moves(self) -> int | None:
        """Ascent steps that each modality takes in one batch; None: not known."""
        return None

    def lessons(self, perturber: Perturber) -> int:
        """Return the number of passes that parameters learn from before each update."""
        del perturber
        return 1

    def check(self, perturber: Perturber) -> None:
        """Raise ConfigurationError if this maximiser makes no sense with `perturber`."""
        del perturber

    @abstractmethod
    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        """The generator of probes for one batch: yields a `Probe`, is sent its `Feedback`, returns the final perturbations.

        Arguments:
            perturber: where the perturbations start, and how they move.
            generator: source of random numbers; None: torch's own.
            state: the state that a maximiser carries from batch to batch, if it does; changed only when a batch is
                done.

        Returns:
            Modality to its final perturbation, of the shape of the site's tensor, in fp32 at least.

        Raises:
            ConfigurationError: something that it needs is missing: a state, a loss for each row, a judge of rows.
        """


def turns_of(perturber: Perturber, order: Order) -> list[tuple[str, ...]]:
    each: list[tuple[str, ...]] = [(modality,) for modality in perturber.modalities]
    return each if order == "in turn" and each else [perturber.modalities]


def some_pass_starts_at_zero(perturber: Perturber, order: Order) -> bool:
    starts = perturber.starts()
    turns = [turn for turn in turns_of(perturber, order) if turn]  # none where nothing is perturbed, and that is meant
    return any(all(isinstance(starts[modality], Zero) for modality in turn) for turn in turns)


def check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"expected {name} to be a whole number of 1 or more, got {value!r}")


def check_order(order: str) -> None:
    if not is_choice(order, get_args(Order)):
        raise ConfigurationError(f"expected modalities to be one of {get_args(Order)}, got {order!r}")


def check_parts(perturber: object, maximizer: object) -> None:
    """Raise ConfigurationError unless they are a perturber and a maximiser; the two are easily swapped."""
    if not isinstance(perturber, Perturber):
        raise ConfigurationError(f"expected a perturber such as EmbeddingPerturber(text=…), got {perturber!r}")
    if not isinstance(maximizer, InnerMaximizer):
        raise ConfigurationError(f"expected an inner maximiser such as FreeLB(steps=3), got {maximizer!r}")
