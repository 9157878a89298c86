"""Curves of accuracy against radius, the names of budgets, and the attack that won at each.

Legend: N examples, R budgets, A attacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.evaluation.curve_views import CurveViews
from advvl.evaluation.measurement import Budget, Measurement, length_of, lies_inside, norm_of, radius_of
from advvl.evaluation.statistics import Interval, accuracy_interval


@dataclass(frozen=True, eq=False)
class Curve(CurveViews):
    """The worst scores of N examples at R radii, each of whose budgets holds the one before.

    Arguments:
        kind: of its budgets, such as "image (L2)".
        radii: ascending, of the first modality.
        marks: each budget's radii in words, such as "0.5" or "0.5 + 1".
        places: of the budgets in the measurement.
        clean: `(N,)` fp64.
        scores: `(R, N)` fp64.
    """

    kind: str
    radii: tuple[float, ...]
    marks: tuple[str, ...]
    places: tuple[int, ...]
    clean: Tensor
    scores: Tensor

    @property
    def title(self) -> str:
        return self.kind


def kind_of(budget: Budget) -> str:
    """Name the modalities and norms of a budget, such as "image (L2) + text (Linf per token)"."""
    return " + ".join(f"{modality} ({norm_of(ball)})" for modality, ball in budget.items()) or "nothing"


def radii_of(budget: Budget) -> str:
    """Name the radii of a budget in the order of `kind_of`, such as "0.5 + 1"."""
    return " + ".join(length_of(ball) for ball in budget.values()) or "0"


def curves_of(measurement: Measurement) -> tuple[Curve, ...]:
    """Sort the budgets of finite radius into curves: those of one kind that lie inside one another."""
    chains: list[list[int]] = []
    bounded = [r for r, budget in enumerate(measurement.budgets) if budget and _is_bounded(budget)]
    for r in sorted(bounded, key=lambda r: [radius_of(ball) for ball in measurement.budgets[r].values()]):
        budget = measurement.budgets[r]
        for chain in chains:
            last = measurement.budgets[chain[-1]]
            if last.keys() == budget.keys() and lies_inside(last, budget) and _first(last) < _first(budget):
                chain.append(r)
                break
        else:
            chains.append([r])
    chains.sort(key=min)
    worst = measurement.worst()
    kinds = [kind_of(measurement.budgets[chain[0]]) for chain in chains]
    return tuple(
        Curve(
            kind if kinds.count(kind) == 1 else f"{kind} from {radii_of(measurement.budgets[chain[0]])}",
            tuple(_first(measurement.budgets[r]) for r in chain),
            tuple(radii_of(measurement.budgets[r]) for r in chain),
            tuple(chain),
            measurement.clean,
            worst[chain],
        )
        for kind, chain in zip(kinds, chains, strict=True)
    )


def accuracies(measurement: Measurement, *, confidence: float = 0.95) -> tuple[Interval, ...]:
    """Wilson's intervals of the clean accuracy and of the worst at each budget, R + 1 of them."""
    rows = (measurement.clean, *measurement.worst())
    return tuple(accuracy_interval([row.tolist()], confidence=confidence) for row in rows)


def wins(measurement: Measurement) -> Tensor:
    """Count `(R, A)` the examples that lost score within a budget, by the first attack that came to their lowest."""
    scores = measurement.scores.nan_to_num(nan=math.inf)
    lowest, winner = scores.min(dim=1)
    lost = lowest < measurement.clean
    return torch.stack([((winner == a) & lost).sum(dim=1) for a in range(len(measurement.attacks))], dim=1)


def _first(budget: Budget) -> float:
    return radius_of(next(iter(budget.values())))


def _is_bounded(budget: Budget) -> bool:
    return all(math.isfinite(radius_of(ball)) for ball in budget.values())
