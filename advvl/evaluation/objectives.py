"""The objectives that an attack on an answerer climbs, and the score that it tries to take away: one number per row.

Legend: B rows, A answers. Targets are VQA's soft scores in [0, 1]; an answer is right if its score is above 0. A row
with no right answer scores 0 whatever is answered, so there is nothing to attack: its objectives are exactly 0, and so
are their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from advvl.checks import is_whole, shown
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.passes.from_clean import FromClean

Objective = Callable[[Tensor, Tensor], Tensor]
TargetedObjective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits, targets and wanted answers, all `(B, A)`, to `(B,)`."""


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """The target score `(B,)` of the answer of the largest logit, the first of equals. Source: VQA's evaluation."""
    _check(logits, targets)
    return targets.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy `(B,)` against the targets, normalised to sum to 1; 0 for a row with no right answer.

    Its gradient vanishes where the model is sure of the right answer; `margin` and `dlr` have one there.
    """
    _check(logits, targets)
    total = targets.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, targets / torch.where(total > 0, total, 1), 0)
    return -(shares.to(logits.dtype) * logits.log_softmax(dim=1)).sum(dim=1)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The largest wrong logit minus the largest right one, `(B,)`; 0 where no answer is right, or none is wrong.

    Unlike cross-entropy its gradient does not vanish where the model is sure. Source: the loss f6 of Carlini & Wagner,
    IEEE S&P 2017, on logits, without its floor.
    """
    _check(logits, targets)
    right = targets > 0
    gap = logits.masked_fill(right, -math.inf).amax(dim=1) - logits.masked_fill(~right, -math.inf).amax(dim=1)
    return torch.where(right.any(dim=1) & (~right).any(dim=1), gap, 0)


def dlr(logits: Tensor, targets: Tensor) -> Tensor:
    """The difference of logits ratio `(B,)`: the margin over the gap between the largest and the third-largest logit.

    Neither its value nor the direction of its gradient changes if the model multiplies its logits by a number. Of several
    right answers only the one of the largest logit counts. Where the gap is 0, or there is no third answer, it is the
    margin. Source: Croce & Hein, ICML 2020, Eq. 6.

    Raises:
        ShapeError: fewer than three answers.
    """
    _check(logits, targets, answers=3)
    right = targets > 0
    best = logits.masked_fill(~right, -math.inf).argmax(dim=1, keepdim=True)
    others = logits.masked_fill(right.scatter(1, best, False), -math.inf)  # else two right answers make it a constant
    largest = others.topk(3, dim=1).values
    return margin(logits, targets) / _usable(largest[:, 0] - largest[:, 2])


OBJECTIVES: Final[Mapping[str, Objective]] = {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr}


def targeted_cross_entropy(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """The log-likelihood `(B,)` of the answers that the attacker wants, `(B, A)` as targets are; 0 where it wants none.

    Its gradient does not vanish where the model is sure of another answer. Targets play no part.
    """
    del targets
    return -cross_entropy(logits, wanted)


def targeted_margin(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """The largest wanted logit minus the largest other one, `(B,)`: above 0 where the attacker gets its answer.

    Targets play no part. Source: Carlini & Wagner, IEEE S&P 2017, f6.
    """
    del targets
    return -margin(logits, wanted)


def targeted_dlr(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """The targeted difference of logits ratio `(B,)`: the wanted logit minus the right one, over a gap of logits.

    The gap is from the largest logit to the mean of the third- and the fourth-largest one. Of several right or wanted
    answers the one of the largest logit counts; 0 where there is none. Source: Croce & Hein, ICML 2020, Eq. 7.

    Raises:
        ShapeError: fewer than four answers.
    """
    _check(logits, targets, answers=4)
    _check(logits, wanted)
    right, want = targets > 0, wanted > 0
    ahead = logits.masked_fill(~want, -math.inf).amax(dim=1) - logits.masked_fill(~right, -math.inf).amax(dim=1)
    largest = logits.topk(4, dim=1).values
    gap = _usable(largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2)
    return torch.where(right.any(dim=1) & want.any(dim=1), ahead, 0) / gap


def towards(objective: TargetedObjective, *, answer: int | None = None, rank: int | None = None) -> FromClean:
    """The loss of a targeted attack: an objective with one wanted answer for each row.

        NamedAttack(name="to answer 3", maximizer=PGD(20), loss=towards(targeted_margin, answer=3))
        [NamedAttack(name=f"to rank {k}", maximizer=AutoPGD(20), loss=towards(targeted_dlr, rank=k)) for k in range(1, 10)]

    The targets are the clean answer, of which an attacker needs no label, or the likeliest other answer where the clean
    one is wanted.

    Arguments:
        objective: `targeted_cross_entropy`, `targeted_margin`, `targeted_dlr`, or one of your own.
        answer: the wanted one, the same for all rows, from 0.
        rank: in the place of `answer`: the wanted one is the `rank`-th likeliest by the clean logits, of all but the
            clean answer, from 1.

    Raises:
        ConfigurationError: not exactly one of `answer` and `rank`, or one that is no whole number from there.
        DataError: in an attack, an answer or a rank that the model's logits do not have.

    Source: Croce & Hein, ICML 2020, section 5 (the ranks).
    """
    given = [(one, least) for one, least in ((answer, 0), (rank, 1)) if one is not None]
    if not callable(objective) or len(given) != 1 or not is_whole(given[0][0]) or given[0][0] < given[0][1]:
        raise ConfigurationError(
            "expected an objective with either answer of 0 or more or rank of 1 or more, "
            f"got {shown(objective)}, {shown(answer)} and {shown(rank)}"
        )
    return FromClean(partial(_towards, objective=objective, answer=answer, rank=rank))


def _towards(
    logits: Tensor, clean: Tensor, *, objective: TargetedObjective, answer: int | None, rank: int | None
) -> Tensor:
    _check(logits, clean)
    answers = clean.shape[1]
    if max(1, rank or answer or 0) >= answers:
        asked = f"answer {answer}" if rank is None else f"rank {rank}"
        raise DataError(f"expected logits with {asked}, got {answers} answers; attack for another one")
    order = clean.sort(dim=1, descending=True, stable=True).indices
    wanted = order[:, rank] if rank is not None else torch.full_like(order[:, 0], answer or 0)
    against = torch.where(order[:, 0] == wanted, order[:, 1], order[:, 0])
    return objective(logits, as_scores(against, logits), as_scores(wanted, logits))


def kl_from_clean(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(clean ‖ perturbed) `(B,)` between the answers' distributions, from logits `(B, A)` of both; no label is needed.

    At the clean point its gradient is zero: start at random. Source: Zhang et al. (TRADES), ICML 2019, Eq. 7.
    """
    _check(logits, clean)
    before, after = clean.detach().log_softmax(dim=1), logits.log_softmax(dim=1)
    return (before.exp() * (before - after)).sum(dim=1)


def squared_distance(features: Tensor, clean: Tensor) -> Tensor:
    """The squared L2 distance `(B,)` between features `(B, …)`, perturbed and clean.

    At the clean point its gradient is zero: start at random. Source: Schlarmann et al. (FARE), ICML 2024.
    """
    return (_rows(features, clean) - clean.detach().flatten(1)).square().sum(dim=1)


def cosine_distance(features: Tensor, clean: Tensor) -> Tensor:
    """One minus the cosine `(B,)` of the angle between features `(B, …)`, perturbed and clean; 1 where one is zero.

    At the clean point its gradient is zero: start at random. Source: the similarity of CLIP's embeddings, Radford et
    al., ICML 2021.
    """
    return 1 - cosine_similarity(_rows(features, clean), clean.detach().flatten(1), dim=1)


def as_scores(targets: Tensor, logits: Tensor) -> Tensor:
    """Return soft scores `(B, A)`: of class ids `(B,)`, whole numbers, 1 for that class and 0 for any other.

    Raises:
        DataError: an id that is no class of the logits `(B, A)`.
    """
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return targets
    classes = logits.shape[-1]
    if not ((targets >= 0) & (targets < classes)).all():
        wrong = sorted(set(targets[(targets < 0) | (targets >= classes)].tolist()))
        raise DataError(
            f"expected targets as class ids in 0..{classes - 1}, got {wrong[:10]}; leave other examples out"
        )
    return one_hot(targets.long(), classes).to(torch.promote_types(logits.dtype, torch.float32))


def _check(logits: Tensor, targets: Tensor, *, answers: int = 0) -> None:
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ShapeError(
            f"expected logits and targets of one shape (B, A), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.shape[1] < answers:
        raise ShapeError(f"expected {answers} answers or more, got {logits.shape[1]}; climb the margin")


def _rows(features: Tensor, clean: Tensor) -> Tensor:
    if features.ndim < 2 or features.shape != clean.shape:
        raise ShapeError(f"expected features of one shape (B, …), got {tuple(features.shape)} and {tuple(clean.shape)}")
    return features.flatten(1)


def _usable(gap: Tensor) -> Tensor:
    return torch.where((gap > 0) & gap.isfinite(), gap, 1)
