"""Searches: an attack made on a batch, with every point that it visits looked at, not only the one that it ends at.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advvl.adapters.base import Adapter, Outputs
from advvl.attacks import Attack
from advvl.errors import ShapeError
from advvl.evaluation.scoring import Batch, Score, fresh
from advvl.maximizers.base import AscentState, InnerMaximizer
from advvl.maximizers.probes import Feedback, Probes
from advvl.maximizers.rows import pick
from advvl.passes.from_clean import FromClean
from advvl.passes.objective import Loss
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.base import Perturber
from advvl.perturbers.places import Place


@dataclass(frozen=True)
class Searched:
    """The result of an attack on a batch, by its own word: nothing here is verified yet.

    Arguments:
        ended: modality to the perturbation that the attack gave back.
        worst: modality to the perturbation of each row's lowest score seen, and of the highest loss among equals.
        seen: that score, `(B,)` fp64.
        losses: the highest loss of each row seen, `(B,)` fp64.
        unmoved: modality to rows `(B,)`, bool, that no gradient moved; empty without gradients.
        nonfinite: modality to rows `(B,)`, bool, whose gradient was not finite in some pass.
        by_gradients: whether it asked for gradients.
    """

    ended: Mapping[str, Tensor]
    worst: Mapping[str, Tensor]
    seen: Tensor
    losses: Tensor
    unmoved: Mapping[str, Tensor]
    nonfinite: Mapping[str, Tensor]
    by_gradients: bool


def search(
    adapter: Adapter,
    batch: Batch,
    ascents: Mapping[str, Ascent],
    maximizer: InnerMaximizer,
    loss: Loss | FromClean,
    score: Score,
    *,
    seed: int,
    end_pass: bool = False,
) -> Searched:
    """Make an attack on a batch.

    Arguments:
        loss: from outputs and batch to what is climbed, one per row `(B,)`, or a `FromClean`.
        score: from outputs and batch to what the attack tries to take away, `(B,)`.
        seed: of its random draws.
        end_pass: look at the point where it ends too, which costs a forward.

    Raises:
        ShapeError: a loss that is not one per row.
    """
    if isinstance(loss, FromClean):
        with fresh(adapter.model, seed):
            loss = loss.on(adapter, batch)
    perturber = _Joined(**ascents)
    watch = _Watch(perturber.leaves, loss, score)
    watched = _Watched(maximizer, watch)
    attack = Attack(perturber, watched, loss=watch, correct=watch.correct, seed=seed, end_pass=end_pass)
    result = attack(adapter, batch)
    assert watch.lowest is not None
    assert watch.highest is not None
    rows = len(watch.lowest)
    unmoved, moved, nonfinite = (
        {modality: result.of_examples(modality, flags, rows) for modality, flags in of.items()}
        for of in (result.unmoved, result.moved, result.nonfinite)
    )
    return Searched(
        result.deltas,
        watch.worst,
        watch.lowest,
        watch.highest,
        {modality: still & ~moved[modality] for modality, still in unmoved.items()},
        nonfinite,
        watched.by_gradients,
    )


class _Joined(EmbeddingPerturber):
    """Keeps the leaves of the pass that runs, so that a loss can be joined to those that it does not depend on.

    A model that ignores a modality is an honest one: its gradient there is zero, not missing.
    """

    def __init__(self, **ascents: Ascent) -> None:
        super().__init__(**ascents)
        self.leaves: dict[str, Tensor] = {}

    def apply(self, modality: str, place: Place, x: Tensor, delta: Tensor) -> Tensor:
        self.leaves[modality] = delta
        return super().apply(modality, place, x, delta)


@dataclass
class _Watch:
    """An attack's loss, which keeps the worst point of each row as points come by."""

    leaves: dict[str, Tensor]
    loss: Loss
    score: Score
    lowest: Tensor | None = None
    highest: Tensor | None = None
    worst: dict[str, Tensor] = field(default_factory=dict)
    _here: Tensor | None = None
    _losses: Tensor | None = None
    _at_worst: Tensor | None = None
    _places: dict[str, Place] = field(default_factory=dict)

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        losses = self.loss(outputs, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ShapeError(f"expected an attack's loss as one per row (B,), got {got}; use reduction='none'")
        with torch.no_grad():
            self._here = self.score(outputs, batch)
        self._losses = losses.detach().double().nan_to_num(nan=-torch.inf)
        if torch.is_grad_enabled():
            nothing = [(0 * leaf).sum() for leaf in self.leaves.values() if leaf.requires_grad]
            losses = losses + sum(nothing[1:], nothing[0]).to(losses.dtype) if nothing else losses
        self.leaves.clear()
        return losses

    def correct(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The rows of the pass that runs with a score left, `(B,)`, bool; called after the loss."""
        del outputs, batch
        assert self._here is not None
        return self._here > 0

    def see(self, feedback: Feedback) -> None:
        """Look at the point of the pass that has just been run, if one was."""
        here, losses, self._here = self._here, self._losses, None
        if here is None or losses is None:
            return
        self.highest = losses if self.highest is None else torch.maximum(self.highest, losses)
        if self.lowest is None or self._at_worst is None:
            self.lowest, self._at_worst, self.worst = here, losses, dict(feedback.deltas)
            self._places = dict(feedback.places)
            return
        better = (here < self.lowest) | ((here == self.lowest) & (losses > self._at_worst))
        self._places.update(feedback.places)
        for modality, place in self._places.items():  # of modalities in turn, those not in this pass were clean
            there, now = (of.get(modality) for of in (self.worst, feedback.deltas))
            clean = torch.zeros_like(next(delta for delta in (there, now) if delta is not None))
            sides = {modality: clean if now is None else now}, {modality: clean if there is None else there}
            self.worst |= pick(better, *sides, {modality: place})
        self.lowest, self._at_worst = (
            torch.where(better, here, self.lowest),
            torch.where(better, losses, self._at_worst),
        )


class _Watched(InnerMaximizer):
    """A maximiser whose every pass is seen."""

    def __init__(self, inner: InnerMaximizer, watch: _Watch) -> None:
        self.inner, self.watch, self.by_gradients = inner, watch, False

    @property
    def updates(self) -> int:
        return self.inner.updates

    @property
    def moves(self) -> int | None:
        return self.inner.moves

    def check(self, perturber: Perturber) -> None:
        self.inner.check(perturber)

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        inner = self.inner.probes(perturber, generator=generator, state=state)
        with closing(inner):
            probe = next(inner)
            while True:
                self.by_gradients |= probe.delta_gradients
                feedback = yield probe
                self.watch.see(feedback)
                try:
                    probe = inner.send(feedback)
                except StopIteration as stop:
                    ended: Mapping[str, Tensor] = stop.value
                    return ended
