"""Robustness: the worst score of each example over every attack that was made on it.

An example's robust score at a radius is the lowest score seen at any point that any attack visited inside that radius:
every step of every restart of every objective. A smaller ball lies inside every larger one, so what broke an example at
a smaller radius breaks it at all larger ones and is not looked for again. What is found is an upper bound on the true
robust accuracy: a better attack can only lower it.

Legend: N examples, B rows of a batch, R radii.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advvl.adapters.base import Adapter
from advvl.checks import (
    are_increasing,
    at_least,
    check_each,
    check_functions,
    instance,
    is_choice,
    is_whole,
    positive,
    shown,
)
from advvl.errors import ConfigurationError, DataError, NonFiniteError, more
from advvl.evaluation.attempts import Rows, check_answers, check_bounds, cut, objective_loss
from advvl.evaluation.curve_views import CurveViews
from advvl.evaluation.objectives import OBJECTIVES
from advvl.evaluation.scoring import Batch, Targets, answer_score, fresh, own_targets
from advvl.evaluation.searches import search
from advvl.evaluation.worst_case import each
from advvl.maximizers.pgd import PGD
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.starts import Uniform, Zero


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """The attacks that are made at each radius, whose worst counts: L2 PGD, restarts times objectives.

    Arguments:
        steps: of each attack.
        step_fraction: step size as a fraction of the radius; 20 steps of 1/8 can cross the ball.
        restarts: the first starts at the clean example, the others at random inside the ball.
        objectives: names in `OBJECTIVES`, each attacked for by itself.
        boxes: the lower and upper bound of x + δ by modality, such as (0, 1) for pixels; one that is not named has none.

    Raises:
        ConfigurationError: a count below 1, a fraction that is not finite and above 0, an unknown objective, boxes that are
            no mapping.
    """

    steps: int = 20
    step_fraction: float = 0.125
    restarts: int = 3
    objectives: tuple[str, ...] = ("cross-entropy", "margin")
    boxes: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "restarts")
        positive(self, "step_fraction")
        known = ", ".join(sorted(OBJECTIVES))
        check_each(self, ("objectives",), _are_objectives, f"a tuple of one or more of {known}")
        instance(Mapping, self, "boxes")


def _are_objectives(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) > 0 and all(is_choice(name, tuple(OBJECTIVES)) for name in value)
    )


@dataclass(frozen=True, eq=False)
class RobustnessCurve(CurveViews):
    """Scores of N examples without perturbation and, in the worst case, at R radii.

    Arguments:
        modality: the one perturbed.
        radii: ascending L2 radii, per example.
        clean: `(N,)` fp64 on the CPU.
        scores: `(R, N)` fp64 on the CPU; never above `clean`, nor above the row of a smaller radius.
        unmoved: `(R, N)` bool: examples with a score left that no gradient moved in any attack, so that their score says
            nothing about robustness.
    """

    modality: str
    radii: tuple[float, ...]
    clean: Tensor
    scores: Tensor
    unmoved: Tensor

    @property
    def title(self) -> str:
        return f"{self.modality} (L2)"

    def accuracy(self) -> tuple[float, ...]:
        """The mean worst-case score at each radius."""
        return tuple(self.scores.mean(dim=1).tolist())


def robustness_curve(
    target: Adapter,
    batches: Iterable[Batch],
    *,
    modality: str,
    radii: tuple[float, ...],
    attacks: WorstCase | None = None,
    seed: int = 0,
    targets: Targets | None = None,
    rows: Rows | None = None,
    over_processes: bool = False,
) -> RobustnessCurve:
    """Attack one modality of every example at each radius and keep the worst score.

    The model is left as found: modes, gradients, buffers, hooks and the global random state. Batches must lie on the
    model's device.

    Arguments:
        target: the adapter of a model that gives logits `(B, A)`.
        batches: mappings; the same in the same order give the same curve.
        radii: ascending, finite, above 0.
        attacks: default `WorstCase()`.
        seed: of the random starts.
        targets: from a batch to its soft scores `(B, A)` in [0, 1], or class ids `(B,)`, whole numbers; default: its field
            `targets`.
        rows: from a batch and numbers of rows `(n,)` to the batch of those rows, such as `advvl.evaluation.rows.take_rows`.
            Then only rows with a score left are run; None: whole batches are, since nobody knows what in them has rows.
        over_processes: every process is given the same batches, attacks each n-th of them, and gets the whole curve,
            which is that of one process to the last bit. All have to call it. False: each attacks all it is given.

    Raises:
        ConfigurationError: radii that are not ascending, finite and above 0; over processes, a wrapped model.
        DataError: no example; targets that are neither scores in [0, 1] nor class ids; `rows` that gives others.
        NonFiniteError: logits that are not a number; examples that no attack could move, since no gradient was finite.
        SiteError: the adapter has no such modality, or one of the boxes' modalities.
    """
    _check_scoring(target, targets)
    check_functions(rows=rows)
    if not is_whole(seed) or seed < 0:
        raise ConfigurationError(f"expected seed to be a whole number of 0 or more, got {shown(seed)}")
    if not are_increasing(radii) or not radii:
        raise ConfigurationError(f"expected finite radii above 0, each larger than the one before, got {shown(radii)}")
    if attacks is not None and not isinstance(attacks, WorstCase):
        raise ConfigurationError(f"expected attacks as a WorstCase(…), or None, got {shown(attacks)}")
    if not isinstance(modality, str):
        raise ConfigurationError(f"expected a modality's name, got {shown(modality)}")
    target.check_modalities((modality,))
    attacks = attacks or WorstCase()
    check_bounds(target, boxes=attacks.boxes)

    def scores(number: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        clean = _clean_scores(target, batch, targets or own_targets)
        if rows is not None:
            check_answers(target, rows, batch, len(clean), targets or own_targets)
        worst, unmoved = _worst_scores(
            target, batch, clean, modality, radii, attacks, (seed, number), targets or own_targets, rows
        )
        return clean.cpu(), worst.cpu(), unmoved.cpu()

    found = each(target, batches, scores, over_processes=over_processes)
    if sum(len(clean) for clean, *_ in found) == 0:
        raise DataError("expected one example or more to attack, got none")
    clean, worst, unmoved = zip(*found, strict=True)
    return RobustnessCurve(modality, tuple(radii), torch.cat(clean), torch.cat(worst, dim=1), torch.cat(unmoved, dim=1))


def clean_scores(
    target: Adapter, batches: Iterable[Batch], *, targets: Targets | None = None, over_processes: bool = False
) -> Tensor:
    """Score every example without perturbation, `(N,)` fp64 on the CPU; the model is left as found.

    Arguments:
        targets, over_processes: as in `robustness_curve`.

    Raises:
        ConfigurationError: over processes, a wrapped model.
        DataError: no example; targets that are neither scores in [0, 1] nor class ids.
        NonFiniteError: logits that are not a number.
    """

    _check_scoring(target, targets)

    def scores(number: int, batch: Batch) -> Tensor:
        del number
        return _clean_scores(target, batch, targets or own_targets).cpu()

    found = each(target, batches, scores, over_processes=over_processes)
    if not found:
        raise DataError("expected one example or more to score, got none")
    return torch.cat(found)


def _check_scoring(target: object, targets: object) -> None:
    if not isinstance(target, Adapter):
        raise ConfigurationError(f"expected what adapt(model) gives as target, got {type(target).__name__}")
    check_functions(targets=targets)


def _worst_scores(
    target: Adapter,
    batch: Batch,
    clean: Tensor,
    modality: str,
    radii: tuple[float, ...],
    attacks: WorstCase,
    entropy: tuple[int, ...],
    targets: Targets,
    rows: Rows | None,
) -> tuple[Tensor, Tensor]:
    """The worst score of each row within each radius, `(R, B)`, and the rows with a score left that never moved."""
    worst, found, stuck, score = clean.clone(), [], [], answer_score(target, targets)
    every = torch.arange(len(worst), device=worst.device)
    for r, radius in enumerate(radii):
        unmoved, nonfinite = torch.ones_like(clean, dtype=torch.bool), torch.zeros_like(clean, dtype=torch.bool)
        for restart in range(attacks.restarts):
            for o, name in enumerate(attacks.objectives):
                left = worst.nonzero().squeeze(1)
                if left.numel() == 0:
                    break
                run = every if rows is None else left
                part = batch if rows is None or len(left) == len(worst) else cut(rows, batch, left, targets)
                start = Zero() if restart == 0 else Uniform(radius)
                ascent = Ascent(
                    L2(radius), step_size=radius * attacks.step_fraction, start=start, box=attacks.boxes.get(modality)
                )
                tried = search(
                    target,
                    part,
                    {modality: ascent},
                    PGD(steps=attacks.steps),
                    objective_loss(target, OBJECTIVES[name], targets),
                    score,
                    seed=_seed(*entropy, r, restart, o),
                    end_pass=True,
                )
                if len(tried.seen) != len(run):
                    raise DataError(
                        f"expected rows to give the {len(run)} rows asked for, got {len(tried.seen)}; cut each field"
                    )
                worst[run] = torch.minimum(worst[run], tried.seen)
                unmoved[run] &= tried.unmoved[modality]
                nonfinite[run] |= tried.nonfinite[modality]
        unmoved &= worst > 0
        if (unmoved & nonfinite).any():
            numbers = (unmoved & nonfinite).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"expected finite gradients to attack by, got none in {len(numbers)} rows of a batch, {numbers[:10]}"
                f"{more('not-finite')}"
            )
        found.append(worst.clone())
        stuck.append(unmoved)
    return torch.stack(found), torch.stack(stuck)


def _clean_scores(target: Adapter, batch: Batch, targets: Targets) -> Tensor:
    with fresh(target.model, seed=0):
        return answer_score(target, targets)(target.forward(batch), batch)


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
