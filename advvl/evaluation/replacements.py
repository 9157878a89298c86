"""Replacements: a modality of each example put in the place of another's, at the site where it would be perturbed.

Nothing is drawn and nothing differentiated, so it shows what a model makes of a modality, whatever its gradients say.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from advvl.adapters.base import Adapter, Outputs
from advvl.errors import ConfigurationError
from advvl.evaluation.scoring import Batch, Score, checked_scores, fresh
from advvl.passes.forward import Passes
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2
from advvl.perturbers.places import Place, delta_dtype
from advvl.perturbers.starts import Zero

_MOST: Final = 4  # examples that each one is replaced by


def places_of(adapter: Adapter, batch: Batch, modalities: Iterable[str]) -> Mapping[str, Place]:
    """The tensor at the site of each modality, with its positions."""
    with fresh(adapter.model, 0), Passes(adapter, batch, _unbounded(modalities)) as passes:
        return passes.forward({modality: Zero() for modality in modalities}, wants=False).places


@dataclass(frozen=True)
class Replacement:
    """The perturbations that put other examples of the batch in the place of each, all modalities from the same one.

    Arguments:
        deltas: by modality; zero where an example stays.
        made: `(B,)` bool on the CPU, the examples that it replaces; the others stay.
    """

    deltas: Mapping[str, Tensor]
    made: Tensor


def replacements(places: Mapping[str, Place], targets: Tensor | None, examples: int) -> list[Replacement]:
    """Replace each example by others of its batch, those of another target first, that no order of the data hides.

    All rows of an example are replaced by those of one other, in their order, which must have as many in every modality.
    Padding stays. Where the rows of a modality are not those of examples, or the batch has one example alone, there are no
    replacements.

    Arguments:
        targets: `(B, …)`; None: the nearest examples in the batch come first.
        examples: B.
    """
    owned = {modality: _Owned.of(place, examples) for modality, place in places.items()}
    rows = {modality: one for modality, one in owned.items() if one is not None}
    if len(rows) < len(owned) or not rows or examples < 2:
        return []
    counts = torch.stack([one.counts for one in rows.values()])
    found = []
    for by in _others(targets, counts):
        made = (counts[:, by] == counts).all(dim=0)
        by = torch.where(made, by, torch.arange(examples))
        found.append(Replacement({name: one.taken(places[name], by) for name, one in rows.items()}, made))
    return found


def of_rows(place: Place, values: Tensor) -> Tensor:
    """A value of each example `(B,)`, given to its rows, broadcastable against the tensor of a place."""
    values = values.to(place.x.device)
    if place.owners is not None:
        values = values[place.owners]
    leading = place.x.shape[:1] if place.segments is None else place.segments.shape
    return values.reshape(*leading, *[1] * (place.x.ndim - len(leading)))


@dataclass(frozen=True)
class _Owned:
    """The rows of each example at a place, on the CPU.

    Arguments:
        order: the rows `(n,)` without padding, those of an example together, examples in ascending order.
        counts: `(B,)`, the number of rows of each.
    """

    order: Tensor
    counts: Tensor

    @classmethod
    def of(cls, place: Place, examples: int) -> _Owned | None:
        """Find the rows of each example; None where rows are not those of the B examples."""
        known = place.owners is not None
        owners = place.owners.cpu() if place.owners is not None else torch.arange(len(place.x))
        if (owners >= examples).any() or not (known or len(owners) == examples):
            return None
        rows = torch.arange(len(owners))
        if place.segments is not None and (mask := place.packed_mask) is not None:
            rows = mask.flatten(1).any(dim=1).nonzero().flatten().cpu() if mask.ndim > 1 else mask.nonzero()[:, 0].cpu()
        return cls(rows[owners[rows].argsort(stable=True)], torch.bincount(owners[rows], minlength=examples))

    def taken(self, place: Place, by: Tensor) -> Tensor:
        """The perturbation that turns the rows of each example into those of another `(B,)`, which has as many."""
        x = place.packed(place.x.to(delta_dtype(place.x)))
        first = self.counts.cumsum(0) - self.counts
        owner = torch.repeat_interleave(self.counts)
        source = self.order[first[by][owner] + torch.arange(len(owner)) - first[owner]]
        delta = torch.zeros_like(x)
        delta[self.order] = x[source] - x[self.order]
        return place.masked(delta.reshape(place.x.shape))


def _others(targets: Tensor | None, counts: Tensor) -> Tensor:
    """The examples that each one is replaced by, `(n, B)`: those with as many rows first, then those of another target.

    Arguments:
        counts: of rows, by modality, `(M, B)`.
    """
    examples = counts.shape[1]
    before = (torch.arange(examples) - torch.arange(1, examples)[:, None]) % examples
    worse = 2 * (counts[:, before] != counts[:, None]).any(dim=0).long()
    if targets is not None:
        kinds: Tensor = torch.unique(targets.cpu(), dim=0, return_inverse=True)[1]
        worse += (kinds[before] == kinds).long()
    return before.gather(0, worse.argsort(dim=0, stable=True))[:_MOST]


def negation(place: Place, bounds: tuple[float | Tensor, float | Tensor] | None) -> Tensor:
    """The perturbation that turns a tensor into its negative, or as near as its box allows: far away, whatever the batch."""
    x = place.x.to(delta_dtype(place.x))
    there = -x
    if bounds is not None:
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in bounds)
        there = torch.minimum(torch.maximum(there, low), high)
    return place.masked(there - x)


def outputs_under(
    adapter: Adapter, batch: Batch, deltas: Mapping[str, Tensor], score: Score, *, seed: int
) -> tuple[Tensor, Tensor]:
    """The scores `(B,)` of a model under perturbations, and its logits with a row per example, or else the scores again."""
    with fresh(adapter.model, seed):
        if not deltas:
            with adapter.clean():
                outputs = adapter.forward(batch)
        else:
            with Passes(adapter, batch, _unbounded(deltas)) as passes:
                outputs = passes.forward(deltas, wants=False).outputs
        scores = checked_scores(score(outputs, batch))
        return scores, _answers(adapter, outputs, scores)


def differ(one: Tensor, other: Tensor) -> Tensor:
    """The rows `(B,)`, bool, in which two models' answers differ by more than rounding.

    An entry is held against its own size and that of the two largest, so that a masked answer, at -1e9 or -inf, hides no
    difference of the others.
    """
    wide = [side.double().flatten(1) for side in (one, other)]
    largest = torch.cat([side.topk(min(2, side.shape[1])).values for side in wide], dim=1)
    size = torch.where(largest.isfinite(), largest.abs(), 0).amax(dim=1, keepdim=True).clamp(min=1e-30)
    return ~torch.isclose(wide[0] / size, wide[1] / size, rtol=1e-4, atol=1e-4).all(dim=1)


def _answers(adapter: Adapter, outputs: Outputs, scores: Tensor) -> Tensor:
    try:
        logits = adapter.logits(outputs)
    except ConfigurationError:  # a model that gives none
        return scores.unsqueeze(1)
    return logits if logits.ndim > 1 and len(logits) == len(scores) else scores.unsqueeze(1)


def _unbounded(modalities: Iterable[str]) -> EmbeddingPerturber:
    return EmbeddingPerturber(**{modality: Ascent(L2(), step_size=1.0) for modality in modalities})
