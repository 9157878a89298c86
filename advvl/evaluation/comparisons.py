"""Comparisons of models on the same examples: intervals, tests, and the correction for many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final

import numpy as np
from scipy import stats

from advvl.checks import shown
from advvl.errors import DataError
from advvl.evaluation.measurement import Measurement, name_of
from advvl.evaluation.statistics import Interval, flat, paired_interval
from advvl.runtime.descriptions import differing

ALIKE: Final = (
    "task", "data", "data_fingerprint", "chance", "versions", "attacks", "surrogate", "seed", "draws", "boxes", "pixels",
)  # fmt: skip
"""Entries of `about` that measurements need alike to be compared; one that has an entry is not compared with one without."""


@dataclass(frozen=True)
class McNemar:
    """The result of McNemar's exact test.

    Arguments:
        better: examples that the model has right and the baseline wrong.
        worse: examples that the model has wrong and the baseline right.
        p_value: of two-sided tests; 1 where the two agree on every example.
    """

    better: int
    worse: int
    p_value: float


def mcnemar(scores: Sequence[float], baseline: Sequence[float]) -> McNemar:
    """McNemar's exact test of two models that have equal accuracy, from what each has right of the same examples.

    Only the examples on which one is right and the other wrong count; if the accuracies are equal, either kind is as likely.

    Arguments:
        scores, baseline: of N examples each, 1 (right) or 0 (wrong), in the same order.

    Raises:
        DataError: the two are not equally long, empty, or hold other scores than 0 and 1, for which
            `statistics.bootstrap_difference` gives an interval.

    Source: McNemar, Psychometrika 12 (1947); the exact form is a binomial test.
    """
    here, there = flat(scores), flat(baseline)
    if here.size != there.size or not here.size:
        raise DataError(f"expected scores of the same examples, one or more, got {here.size} and {there.size}")
    if not all(np.isin(values, (0.0, 1.0)).all() for values in (here, there)):
        raise DataError("expected scores of 0 or 1, got others; for soft scores use bootstrap_difference")
    better, worse = int((here > there).sum()), int((here < there).sum())
    # Without an example that tells the two apart there is nothing to test, and no evidence of a difference.
    p_value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return McNemar(better, worse, p_value)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust the p-values of several comparisons, so that one below 0.05 is rarely due to their number.

    If every p-value below a level is called a difference, the chance that one or more of them is none stays at that level.

    Arguments:
        p_values: one for each comparison, in [0, 1].

    Returns:
        The adjusted ones in the same order.

    Raises:
        DataError: a value outside [0, 1].

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    found = flat(p_values)
    if not ((found >= 0) & (found <= 1)).all():
        raise DataError(f"expected a flat list of p-values in [0, 1], got {shown(p_values)}")
    order = np.argsort(found, kind="stable")
    adjusted = np.empty_like(found)
    adjusted[order] = np.maximum.accumulate(found[order] * np.arange(found.size, 0, -1)).clip(max=1)
    return tuple(adjusted.tolist())


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
