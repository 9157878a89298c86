"""Comparisons: tests between two models on the same examples, and the correction for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from advvl.checks import shown
from advvl.errors import DataError
from advvl.evaluation.statistics import flat


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
