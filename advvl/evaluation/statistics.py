"""Intervals: of a mean over seeds, of a mean score over test examples, of a paired difference of either.

An interval over seeds says how another training run may come out; one over examples says how another test set may, for
the one model at hand. Neither stands for the other, so every interval says what it is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from advvl.checks import check_seed, is_number, is_whole, shown
from advvl.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth lies with `confidence`: of `count` numbers, by `method`."""

    estimate: float
    low: float
    high: float
    confidence: float
    count: int
    method: str

    def excludes_zero(self) -> bool:
        """True if zero lies outside."""
        return self.low > 0 or self.high < 0

    def percent(self, *, signed: bool = False) -> str:
        """Write it in per cent, such as "61.5 [54.6, 68.0]"."""
        sign = "+" if signed else ""
        return f"{100 * self.estimate:{sign}.1f} [{100 * self.low:{sign}.1f}, {100 * self.high:{sign}.1f}]"


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, within: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Student's t-interval of the mean of independent `values`, such as one number for each seed.

    Arguments:
        values: two or more, finite.
        confidence: of the interval, in (0, 1).
        within: where the mean can lie, such as (0, 1) for accuracies; the interval is cut there.

    Raises:
        DataError: fewer than two values, one that is not finite, or one that lies outside `within`.
        ConfigurationError: a confidence outside (0, 1), or `within` that is no pair of numbers.

    Source: any textbook; exact for normal values.
    """
    numbers = _finite(values)
    check_confidence(confidence)
    if not isinstance(within, tuple | list) or len(within) != 2 or not all(map(is_number, within)):
        raise ConfigurationError(f"expected within=(lower, upper) of numbers, got {shown(within)}")
    if numbers.size < 2:
        raise DataError(f"expected two or more values to see how they scatter, got {numbers.size}; run more seeds")
    if not within[0] <= numbers.min() <= numbers.max() <= within[1]:
        raise DataError(f"expected values within {within}, got {numbers.min():g} to {numbers.max():g}; change within=…")
    mean = float(numbers.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, numbers.size - 1) * numbers.std(ddof=1) / math.sqrt(numbers.size))
    low, high = max(mean - half, within[0]), min(mean + half, within[1])
    return Interval(mean, low, high, confidence, int(numbers.size), "t")


def difference_interval(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The paired t-interval of `values - baseline`: the i-th of both share their seed, or their test example.

    Arguments:
        within: where the difference can lie, such as (-1, 1) for that of accuracies.

    Raises:
        DataError: the two are not equally long; otherwise as `mean_interval`.
        ConfigurationError: as `mean_interval`.
    """
    return mean_interval(
        _differences(_finite(values), _finite(baseline)).tolist(), confidence=confidence, within=within
    )


def paired_p_value(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The two-sided p-value of the paired t-test of equal means: the i-th of both share their seed.

    Returns:
        None where all differences are equal: there is no scatter to test by.

    Raises:
        DataError: the two are not equally long, or fewer than two; a value that is not finite.
    """
    differences = _differences(_finite(values), _finite(baseline))
    if differences.size < 2:
        raise DataError(f"expected two or more pairs to see how they scatter, got {differences.size}; run more seeds")
    if differences.max() - differences.min() <= 1e-12 * np.abs(differences).max():
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def bootstrap_interval(
    scores: Sequence[float], *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval of the mean of scores in [0, 1], one for each test example.

    Of soft scores, such as VQA's, it is narrower than Wilson's. Where all scores are equal, resampling shows no scatter:
    the interval is then Wilson's, and says so in `method`.

    Arguments:
        resamples: how often the examples are drawn with replacement.
        seed: of these draws.

    Raises:
        DataError: no score, or one outside [0, 1].
        ConfigurationError: a confidence outside (0, 1), fewer than 100 resamples.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, by scipy.
    """
    numbers = _scores(scores)
    if numbers.max() == numbers.min():
        return accuracy_interval([scores], confidence=confidence)
    return _bootstrap(numbers, confidence, resamples, seed)


def bootstrap_difference(
    scores: Sequence[float],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of the mean of `scores - baseline` in [0, 1], paired by example.

    Examples are drawn as pairs. Where all differences are equal, the interval is Agresti and Min's, and says so in `method`.

    Raises:
        DataError: the two are not equally long, empty, or outside [0, 1].
        ConfigurationError: as `bootstrap_interval`.
    """
    differences = _differences(_scores(scores), _scores(baseline))
    if differences.max() == differences.min():
        return paired_interval(scores, baseline, confidence=confidence)
    return _bootstrap(differences, confidence, resamples, seed)


def paired_interval(scores: Sequence[float], baseline: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Agresti and Min's interval of the mean of `scores - baseline`, both of N numbers in [0, 1], paired by example.

    Half an example is added to each of the four outcomes of a pair (both right, both wrong, one right), so that it keeps
    a width where the two agree on every example. Scores between 0 and 1 count as parts of examples.

    Raises:
        DataError: the two are not equally long, empty, or outside [0, 1].
        ConfigurationError: a confidence outside (0, 1).

    Source: Agresti & Min, Statistics in Medicine 24 (2005), for binary scores.
    """
    differences = _differences(_scores(scores), _scores(baseline))
    check_confidence(confidence)
    count = int(differences.size)
    estimate, centre = float(differences.mean()), float(differences.sum()) / (count + 2)
    variance = (float(np.square(differences).sum()) + 1) / (count + 2) - centre**2
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance / (count + 2))
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return Interval(estimate, min(low, estimate), max(high, estimate), confidence, count, "Agresti-Min")


def median_interval(
    values: Sequence[float], *, confidence: float = 0.95, within: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """The interval of the median of independent `values`, from one of them to another, by their ranks.

    It covers the true median with `confidence` or more, however the values are distributed, infinite ones among them. Of
    too few values, fewer than 6 at 95 %, it is all of `within`.

    Arguments:
        values: one or more, not NaN.
        within: where the median can lie.

    Raises:
        DataError: no value, or one that is not a number.
        ConfigurationError: a confidence outside (0, 1).

    Source: Conover, Practical Nonparametric Statistics (1999), section 3.2, by scipy.
    """
    check_confidence(confidence)
    numbers = flat(values)
    if not numbers.size or np.isnan(numbers).any():
        raise DataError(f"expected one number or more for a median, got {shown(values)}")
    ends = stats.quantile_test(numbers, p=0.5).confidence_interval(confidence)
    low, high = (
        float(bound if math.isnan(end) else end) for end, bound in zip((ends.low, ends.high), within, strict=True)
    )
    return Interval(float(np.median(numbers)), low, high, confidence, int(numbers.size), "ranks")


def proportion_interval(successes: float, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, such as one model's accuracy over test examples.

    It keeps its sense at 0 and 1, where the normal interval has no width. `successes` may be a sum of scores in [0, 1],
    such as VQA's: a mean of such scores varies no more than a proportion of the same size, so the interval is then
    wide enough, and wider than it need be.

    Raises:
        DataError: unless `trials` is a whole number of 1 or more and `0 <= successes <= trials`.
        ConfigurationError: a confidence outside (0, 1).

    Source: Wilson, JASA 22 (1927).
    """
    check_confidence(confidence)
    if not is_whole(trials) or trials < 1:
        raise DataError(f"expected trials to be a whole number of 1 or more, got {shown(trials)}")
    if not is_number(successes) or not 0 <= successes <= trials:
        raise DataError(f"expected 0 to {trials} successes, got {shown(successes)}")
    share = successes / trials
    z = float(stats.norm.ppf((1 + confidence) / 2))
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / shrink
    # At 0 and 1 one end is the estimate itself, which rounding must not push past it.
    low = 0.0 if successes == 0 else min(centre - half, share)
    high = 1.0 if successes == trials else max(centre + half, share)
    return Interval(share, low, high, confidence, trials, "Wilson")


def accuracy_interval(by_seed: Sequence[Sequence[float]], *, confidence: float = 0.95) -> Interval:
    """The interval of an accuracy: of several seeds the t-interval of its mean, of one Wilson's over test examples.

    Arguments:
        by_seed: for each seed the scores in [0, 1], one for each test example.

    Raises:
        DataError: no score, or one outside [0, 1].
        ConfigurationError: a confidence outside (0, 1).
    """
    scores = [_scores(one) for one in by_seed]
    if len(scores) > 1:
        return mean_interval([float(one.mean()) for one in scores], confidence=confidence, within=(0.0, 1.0))
    (only,) = scores
    return proportion_interval(float(only.sum()), int(only.size), confidence=confidence)


def score_interval(scores: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The interval of a mean score over examples: Wilson's of scores of 0 and 1, a bootstrap of the examples of soft ones.

    Raises:
        DataError: no score, or one outside [0, 1].
        ConfigurationError: a confidence outside (0, 1).
    """
    hard = bool(np.isin(_scores(scores), (0.0, 1.0)).all())
    return (
        accuracy_interval([scores], confidence=confidence)
        if hard
        else bootstrap_interval(scores, confidence=confidence)
    )


def flat(values: Sequence[float]) -> NDArray[np.float64]:
    """Return a flat list of numbers as an array.

    Raises:
        DataError: anything else.
    """
    try:
        numbers = np.asarray(values)
        if numbers.ndim == 1 and (not numbers.size or numbers.dtype.kind in "biuf"):
            return numbers.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # lists of unequal lengths, tensors that numpy cannot read
        pass
    raise DataError(f"expected a flat list of numbers, got {shown(values)}")


def _bootstrap(numbers: NDArray[np.float64], confidence: float, resamples: int, seed: int) -> Interval:
    check_confidence(confidence)
    check_seed(seed)
    if not is_whole(resamples) or resamples < 100:
        raise ConfigurationError(f"expected 100 resamples or more, got {shown(resamples)}")
    low, high = stats.bootstrap(
        (numbers,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 10**7 // numbers.size),  # resamples held in memory at a time
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(numbers.mean()), float(low), float(high), confidence, int(numbers.size), "bootstrap")


def _scores(values: Sequence[float]) -> NDArray[np.float64]:
    numbers = _finite(values)
    if not numbers.size:
        raise DataError("expected one score or more, got none")
    if numbers.min() < 0 or numbers.max() > 1:
        raise DataError(f"expected scores in [0, 1], got {numbers.min():g} to {numbers.max():g}; divide by their cap")
    return numbers


def _differences(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(values) != len(baseline):
        raise DataError(
            f"expected as many values as the baseline's {len(baseline)}, got {len(values)}; pair them by seed"
        )
    return values - baseline


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    numbers = flat(values)
    if not np.isfinite(numbers).all():
        raise DataError(f"expected a flat list of finite numbers, got {shown(values)}")
    return numbers


def check_confidence(confidence: float) -> None:
    """Raise ConfigurationError for a confidence that is no number in (0, 1)."""
    if not is_number(confidence) or not 0 < confidence < 1:
        raise ConfigurationError(f"expected a confidence between 0 and 1, such as 0.95, got {shown(confidence)}")
