"""Inner maximisers: which passes to run at which perturbations, and what to make of what they gave.

A maximiser is a generator. It yields a `Probe`, a pass it wants, and is sent a `Feedback`, what that pass gave; at the
end it returns the final perturbations. It never sees a model, so each is a handful of lines and is tested without one.
The driver (`passes`, under `training` or `attacks`) closes the generator on any exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from advvl.balls import Place
from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers import Carried, Perturber, Zero
from advvl.probes import Feedback, Probe, Probes

Order = Literal["together", "in turn"]


@dataclass(repr=False)
class AscentState:
    """What a maximiser carries from batch to batch: free AT's perturbations, local to their process.

    Arguments:
        deltas: modality to its last perturbation, `(B, …)` of the last batch; empty before the first.
    """

    deltas: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"AscentState({ ({name: tuple(delta.shape) for name, delta in self.deltas.items()}) })"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the tensors are not copied."""
        return {"deltas": dict(self.deltas)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ConfigurationError: something else.
        """
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else None
        if keys != ["deltas"] or not isinstance(state["deltas"], Mapping):
            got = type(state).__name__ if keys is None else f"the keys {keys[:8]}"
            raise ConfigurationError(
                f"expected the state_dict() of an AscentState, {{'deltas': …}}, got {got}; "
                "give the entry that it was saved under in the checkpoint"
            )
        wrong = {name: type(delta).__name__ for name, delta in state["deltas"].items() if not isinstance(delta, Tensor)}
        if wrong:
            raise ConfigurationError(f"expected a tensor for each modality, got {wrong}; give what state_dict() gave")
        self.deltas = dict(state["deltas"])


class InnerMaximizer(ABC):
    """Asks for passes, is told what they gave, and never sees the model."""

    @property
    def updates(self) -> int:
        """Parameter updates in one step."""
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
            generator: what it may draw from; None: it draws from torch's own.
            state: what is carried from batch to batch, for a maximiser that does; changed only when a batch is done.

        Returns:
            Modality to its final perturbation, of the shape of the site's tensor, in fp32 at least.

        Raises:
            ConfigurationError: something that it needs is not there: a state, a loss for each row, a judge of rows.
        """


@dataclass(frozen=True)
class FreeLB(InnerMaximizer):
    """K passes whose parameter gradients add up, weighted 1/K, with an ascent step between one and the next.

    K passes make K−1 moves: the last perturbation is used, not moved. With modalities in turn (VILLA's "alter") a step
    is one pass for each, weighted 1/(K·modalities). Source: FreeLB (Zhu et al., ICLR 2020), VILLA's released loop.

    Raises:
        ConfigurationError: steps below 1; steps of 1 with a start at zero, which would perturb nothing.
    """

    steps: int = 3
    modalities: Order = "together"

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)
        _check_order(self.modalities)

    def check(self, perturber: Perturber) -> None:
        if self.steps == 1 and _some_pass_starts_at_zero(perturber, self.modalities):
            raise ConfigurationError(
                "expected FreeLB(steps=2) or more, or a start that is not zero, got steps=1 with Zero(): "
                "its one pass would be clean"
            )

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        apart, passes = self.modalities == "in turn", len(_turns(perturber, self.modalities))
        deltas: Mapping[str, Any] = perturber.starts()
        for step in range(self.steps):
            last, weight = step == self.steps - 1, 1 / (self.steps * passes)
            feedback = yield Probe(deltas, weight, delta_gradients=not last, update=last, apart=apart)
            deltas = feedback.deltas if last else feedback.move(perturber)
        return dict(deltas)


@dataclass(frozen=True)
class PGD(InnerMaximizer):
    """S moves by gradients of the perturbation alone, then one pass at the end of them, which training learns from.

    Arguments:
        steps: moves, S.
        modalities: moved together, or each alone with an end pass of its own, weighted 1/modalities.
        keep: end at the last perturbation, or for each row at the one of the highest loss (one more forward).
        early_stop: a row that is no longer classified correctly moves no further.

    Source: Madry et al., ICLR 2018; early stopping as in the MNIST code of Wong et al., ICLR 2020.

    Raises:
        ConfigurationError: steps below 1; `early_stop` where nothing judges; `keep="best"` without a loss per row.
    """

    steps: int
    modalities: Order = "together"
    keep: Literal["last", "best"] = "last"
    early_stop: bool = False

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)
        _check_order(self.modalities)
        if self.keep not in ("last", "best"):
            raise ConfigurationError(f"expected keep to be 'last' or 'best', got {self.keep!r}")

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator, state
        turns = _turns(perturber, self.modalities)
        ends: dict[str, Tensor] = {}
        for turn in turns:
            starts = perturber.starts()
            deltas: Mapping[str, Any] = {modality: starts[modality] for modality in turn}
            best = _Best()
            for _ in range(self.steps):
                feedback = yield Probe(deltas)
                if self.keep == "best":
                    best.see(feedback)
                deltas = feedback.move(perturber)
                if self.early_stop:
                    deltas = _rows(_correct(feedback), deltas, feedback.deltas, feedback.places)
            if self.keep == "best":
                best.see((yield Probe(deltas, delta_gradients=False)))
                deltas = best.deltas
            feedback = yield Probe(deltas, weight=1 / len(turns), delta_gradients=False, update=turn == turns[-1])
            ends.update(feedback.deltas)
        return ends


@dataclass(frozen=True)
class FreeAT(InnerMaximizer):
    """Each batch replayed m times; every replay's one backward both updates the parameters and moves the perturbation.

    Arguments:
        replays: m, passes and parameter updates a batch.
        modalities: together, or in turn with one update after the last of them.
        carry: keep the perturbation across batches in `state`, moved after every replay (Shafahi et al., NeurIPS 2019,
            as released). False: the NLP variant of FreeLB's code, a new start each batch, loss over m+1.

    Raises:
        ConfigurationError: replays below 1; one replay that would be clean; `carry` without a state.
    """

    replays: int
    modalities: Order = "together"
    carry: bool = True

    def __post_init__(self) -> None:
        _check_count("replays", self.replays)
        _check_order(self.modalities)

    @property
    def updates(self) -> int:
        return self.replays

    def check(self, perturber: Perturber) -> None:
        if self.replays == 1 and not self.carry and _some_pass_starts_at_zero(perturber, self.modalities):
            raise ConfigurationError(
                "expected FreeAT(replays=2) or more, carry=True, or a start that is not zero, got replays=1, carry=False "
                "with Zero(): its one pass would be clean"
            )

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del generator
        if self.carry and state is None:
            raise ConfigurationError(
                "expected state=AscentState() for FreeAT(carry=True), got None; make one before the loop, pass it to "
                "every step, and keep its state_dict() in checkpoints"
            )
        apart, turns = self.modalities == "in turn", len(_turns(perturber, self.modalities))
        carried = {} if state is None or not self.carry else state.deltas
        deltas: Mapping[str, Any] = perturber.starts() | {m: Carried(d) for m, d in carried.items()}
        weight = 1 / turns if self.carry else 1 / ((self.replays + 1) * turns)
        for replay in range(self.replays):
            moves = self.carry or replay < self.replays - 1
            feedback = yield Probe(deltas, weight, delta_gradients=moves, update=True, apart=apart)
            deltas = feedback.move(perturber) if moves else feedback.deltas
        if self.carry and state is not None:
            state.deltas = dict(deltas)
        return dict(deltas)


class _Best:
    """For each row, the perturbation of the highest loss seen."""

    deltas: Mapping[str, Tensor]
    losses: Tensor | None = None

    def see(self, feedback: Feedback) -> None:
        if feedback.losses is None:
            raise ConfigurationError(
                "expected a loss for each row to keep the best of, got a single number; have the loss return (B,), by "
                "reduction='none' in Attack(loss=…), step(loss=…) or adapt(…, loss=…)"
            )
        if self.losses is None:
            self.losses, self.deltas = feedback.losses, feedback.deltas
            return
        better = feedback.losses > self.losses
        self.deltas = _rows(better, feedback.deltas, self.deltas, feedback.places)
        self.losses = torch.where(better, feedback.losses, self.losses)


def _rows(
    chosen: Tensor, yes: Mapping[str, Tensor], no: Mapping[str, Tensor], places: Mapping[str, Place]
) -> dict[str, Tensor]:
    """Row by row, the perturbations of `yes` where `chosen` `(B,)`, else those of `no`."""
    picked = {}
    for modality, delta in yes.items():
        place = places[modality]
        owners = place.examples if place.segments is None else place.segments
        rows = chosen if owners is None else chosen[owners]
        if rows.shape != delta.shape[:1]:
            raise ShapeError(
                f"expected one loss or verdict for each of the {delta.shape[0]} rows of {modality!r}, got "
                f"{tuple(rows.shape)}; where an example has several rows, say which: Site(…, examples=…), or with a ball of "
                "the whole example Site(…, rows=…)"
            )
        picked[modality] = torch.where(rows.reshape(-1, *[1] * (delta.ndim - 1)), delta, no[modality])
    return picked


def _correct(feedback: Feedback) -> Tensor:
    if feedback.correct is None:
        raise ConfigurationError(
            "expected correct=… to stop early by, from (outputs, batch) to the rows still correct (B,) bool, got None; "
            "give it to the attack or the step"
        )
    return feedback.correct


def _turns(perturber: Perturber, order: Order) -> list[tuple[str, ...]]:
    return [perturber.modalities] if order == "together" else [(modality,) for modality in perturber.modalities]


def _some_pass_starts_at_zero(perturber: Perturber, order: Order) -> bool:
    starts = perturber.starts()
    return any(all(isinstance(starts[modality], Zero) for modality in turn) for turn in _turns(perturber, order))


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"expected {name} to be a whole number of 1 or more, got {value!r}")


def _check_order(order: str) -> None:
    if order not in get_args(Order):
        raise ConfigurationError(f"expected modalities to be one of {get_args(Order)}, got {order!r}")
