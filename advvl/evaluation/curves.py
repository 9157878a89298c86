"""Curves of accuracy against radius, with intervals, and what else a page says of measurements.

Legend: N examples, R budgets, A attacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final

import torch
from torch import Tensor

from advvl.errors import DataError
from advvl.evaluation.comparisons import holm, mcnemar
from advvl.evaluation.curve_views import CurveViews
from advvl.evaluation.measurement import Budget, Measurement, lies_inside
from advvl.evaluation.statistics import Interval, paired_interval, proportion_interval
from advvl.perturbers.balls import Ball
from advvl.runtime.descriptions import differing

ALIKE: Final = (
    "task", "data", "data_fingerprint", "versions", "torch", "attacks", "surrogate", "seed", "draws", "boxes", "pixels",
)  # fmt: skip
"""Entries of `about` that measurements need alike to be compared; one that has an entry is not compared with one without."""


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


def kind_of(budget: Budget) -> str:
    """Name the modalities and norms of a budget, such as "image (L2) + text (Linf per token)"."""
    return " + ".join(f"{modality} ({_norm_of(ball)})" for modality, ball in budget.items()) or "nothing"


def radii_of(budget: Budget) -> str:
    """Name the radii of a budget in the order of `kind_of`, such as "0.5 + 1"."""
    return " + ".join(_length(ball) for ball in budget.values()) or "0"


def name_of(budget: Budget) -> str:
    """Name a budget, such as "image L2 0.5 + text Linf per token 0.1"."""
    named = (f"{modality} {_norm_of(ball)} {_length(ball)}" for modality, ball in budget.items())
    return " + ".join(named) or "nothing"


def curves_of(measurement: Measurement) -> tuple[Curve, ...]:
    """Sort the budgets of finite radius into curves: those of one kind that lie inside one another."""
    chains: list[list[int]] = []
    bounded = [r for r, budget in enumerate(measurement.budgets) if budget and _is_bounded(budget)]
    for r in sorted(bounded, key=lambda r: [_radius(ball) for ball in measurement.budgets[r].values()]):
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
    rows = torch.cat([measurement.clean[None], measurement.worst()])
    return tuple(proportion_interval(float(row.sum()), len(row), confidence=confidence) for row in rows)


def wins(measurement: Measurement) -> Tensor:
    """Count `(R, A)` the examples that lost score within a budget, by the first attack that came to their lowest."""
    scores = measurement.scores.nan_to_num(nan=math.inf)
    lowest, winner = scores.min(dim=1)
    lost = lowest < measurement.clean
    return torch.stack([((winner == a) & lost).sum(dim=1) for a in range(len(measurement.attacks))], dim=1)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples at one budget.

    Arguments:
        difference: the mean of the first's scores less the second's.
        p_value: of McNemar's exact test, by Holm's correction for all comparisons of a page; None: of soft scores.
    """

    first: str
    second: str
    budget: str
    difference: Interval
    p_value: float | None


def comparisons(measurements: Mapping[str, Measurement], *, confidence: float = 0.95) -> tuple[Comparison, ...]:
    """Compare every two models on the same examples, clean and at each budget, by Agresti and Min's interval and McNemar."""
    found: list[Comparison] = []
    for (first, one), (second, other) in combinations(measurements.items(), 2):
        names = ["clean", *map(name_of, one.budgets)]
        rows = zip(names, [one.clean, *one.worst()], [other.clean, *other.worst()], strict=True)
        for name, mine, theirs in rows:
            difference = paired_interval(mine.tolist(), theirs.tolist(), confidence=confidence)
            hard = bool(((mine == 0) | (mine == 1)).all() and ((theirs == 0) | (theirs == 1)).all())
            p_value = mcnemar(mine.tolist(), theirs.tolist()).p_value if hard else None
            found.append(Comparison(first, second, name, difference, p_value))
    adjusted = iter(holm([one.p_value for one in found if one.p_value is not None]))
    return tuple(replace(one, p_value=None if one.p_value is None else next(adjusted)) for one in found)


@dataclass(frozen=True)
class Damage:
    """An example that an attack cost a model.

    Arguments:
        model: its name.
        example: its place among the N.
        budget, attack: places of those that left the lowest score; of equal ones the first. An example with soft scores may
            have lost some of its score within a smaller budget.
        clean, worst: its scores.
        norms: modality to the length of the perturbation.
    """

    model: str
    example: int
    budget: int
    attack: int
    clean: float
    worst: float
    norms: Mapping[str, float]


def damages(name: str, measurement: Measurement) -> tuple[Damage, ...]:
    """List the examples that attacks cost a model, those first that fell furthest, within the first budget, by the least."""
    found = []
    scores = measurement.scores.nan_to_num(nan=math.inf)
    lowest, attacks = scores.min(dim=1)
    for example in (lowest < measurement.clean).any(dim=0).nonzero().flatten().tolist():
        r = int(lowest[:, example].argmin())  # the first of the lowest
        a, clean = int(attacks[r, example]), float(measurement.clean[example])
        norms = {modality: float(rows[r, a, example]) for modality, rows in measurement.norms.items()}
        found.append(Damage(name, example, r, a, clean, float(lowest[r, example]), norms))
    return tuple(
        sorted(found, key=lambda one: (one.worst - one.clean, one.budget, *_numbers(one.norms.values()), one.example))
    )


def check_comparable(measurements: Mapping[str, Measurement]) -> None:
    """Check that measurements differ in the model alone, as far as they record: same examples, budgets, attacks, seed, data.

    Raises:
        DataError: they differ in an entry of `ALIKE`, in budgets or in the number of examples; there is none, or one of no
            example.
    """
    if not measurements:
        raise DataError("expected one measurement or more, got none")
    first, *others = measurements.items()
    for name, one in measurements.items():
        if not len(one.clean):
            raise DataError(f"expected one example or more in {name!r}, got none; measure it again")
    for name, one in others:
        for what, mine, theirs in _compared(first[1], one):
            if mine != theirs:
                raise DataError(
                    f"expected measurements of the same {what.replace('_', ' ')} to compare, got "
                    f"{_difference(mine, theirs, first[0], name)}; write a page for each"
                )


def _difference(mine: Any, theirs: Any, first: str, name: str) -> str:
    """Two entries that differ in words; of descriptions, such as of attacks, the fields that do."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        (one, other) = next(pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1])
        if isinstance(one, str) and isinstance(other, str):
            return f"{differing(one, other)}, there of {first!r} and here of {name!r}"
    shown = ["none recorded" if value is None else value for value in (mine, theirs)]
    return f"{shown[0]} of {first!r} and {shown[1]} of {name!r}"


def _compared(one: Measurement, other: Measurement) -> Sequence[tuple[str, Any, Any]]:
    """Pairs of entries that have to be alike, with their names."""
    stated = [(key, one.about.get(key), other.about.get(key)) for key in ALIKE]
    mine, theirs = (list(map(name_of, each.budgets)) for each in (one, other))
    return [
        ("number of examples", len(one.clean), len(other.clean)),
        ("budgets", mine, theirs),
        ("attacks", one.attacks, other.attacks),
        *stated,
    ]


def _numbers(values: Any) -> list[float]:
    return [value if not math.isnan(value) else math.inf for value in values]


def _radius(ball: Ball) -> float:
    found: float = ball.radius  # type: ignore[attr-defined]  # of both kinds that a measurement holds
    return found


def _length(ball: Ball) -> str:
    return "unlimited" if math.isinf(_radius(ball)) else f"{_radius(ball):g}"


def _first(budget: Budget) -> float:
    return _radius(next(iter(budget.values())))


def _is_bounded(budget: Budget) -> bool:
    return all(math.isfinite(_radius(ball)) for ball in budget.values())


def _norm_of(ball: Ball) -> str:
    relative = getattr(ball, "relative", False)
    words = [type(ball).__name__, *(["per token"] if ball.per == "token" else []), *(["relative"] if relative else [])]
    return " ".join(words)
