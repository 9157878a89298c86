"""Replacements: a modality of each example put in the place of another's, at the site where it would be perturbed.

Nothing is drawn and nothing differentiated, so it shows what a model makes of a modality, whatever its gradients say.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def others_of(targets: Tensor | None, examples: int, device: torch.device) -> Tensor:
    """The examples of a batch that each one is replaced by, `(n, B)`, numbers of rows.

    Arguments:
        targets: `(B, …)`; those of another target come first, so that no order of the data hides what a replacement
            shows. None: by their distance in the batch alone.
    """
    rows = torch.arange(examples, device=device)
    before = (rows - torch.arange(1, max(examples, 1), device=device)[:, None]) % max(examples, 1)
    if targets is None:
        return before[:_MOST]
    kinds: Tensor = torch.unique(targets.to(device), dim=0, return_inverse=True)[1]
    same = kinds[before] == kinds
    return before.gather(0, same.long().argsort(dim=0, stable=True))[:_MOST]


def replacements(places: Mapping[str, Place], others: Tensor) -> list[dict[str, Tensor]]:
    """The perturbations that put other examples of the batch in the place of each, all modalities from the same one.

    A row's own padding stays. Where rows are not examples, or the batch has one alone, there are none.

    Arguments:
        others: `(n, B)`, as `others_of` gives them.
    """
    if any(place.owners is not None or len(place.x) != others.shape[1] for place in places.values()):
        return []
    return [{modality: replaced(place, by) for modality, place in places.items()} for by in others]


def replaced(place: Place, by: Tensor) -> Tensor:
    """The perturbation that turns each row of a tensor into the row of these numbers `(B,)`."""
    x = place.x.to(delta_dtype(place.x))
    return place.masked(x[by.to(x.device)] - x)


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
