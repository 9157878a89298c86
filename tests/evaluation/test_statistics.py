"""Intervals, against scipy, numbers worked by hand, and the exact coverage of their definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.statistics import (
    Interval,
    accuracy_interval,
    bootstrap_difference,
    bootstrap_interval,
    difference_interval,
    mean_interval,
    median_interval,
    paired_interval,
    paired_p_value,
    proportion_interval,
)


def test_the_interval_of_a_mean_is_that_of_the_t_distribution() -> None:
    # Mean 3, standard deviation √2.5, n = 5; t(0.975, 4) = 2.776445 from any table.
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (interval.estimate, interval.count, interval.method) == (3.0, 5, "t")
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), rel=1e-7)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_of_a_mean_agrees_with_scipy(count: int, confidence: float) -> None:
    values = np.random.default_rng(0).normal(3, 2, count)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    interval = mean_interval(values.tolist(), confidence=confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.slow
def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    samples = np.random.default_rng(0).normal(1.0, 3.0, (4000, 4))
    covered = np.mean([low <= 1.0 <= high for low, high in map(_ends, samples)])
    assert abs(covered - 0.9) < 3 * math.sqrt(0.09 / 4000)


def _ends(sample: np.ndarray) -> tuple[float, float]:
    interval = mean_interval(sample.tolist(), confidence=0.9)
    return interval.low, interval.high


def test_the_interval_of_a_difference_is_that_of_the_paired_test() -> None:
    generator = np.random.default_rng(1)
    baseline = generator.normal(0.7, 0.1, 6)
    values = baseline + generator.normal(0.02, 0.005, 6)
    expected = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    interval = difference_interval(values.tolist(), baseline.tolist())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert interval.excludes_zero()


def test_the_p_value_of_pairs_is_that_of_the_paired_t_test() -> None:
    values, baseline = [0.61, 0.58, 0.66, 0.6], [0.55, 0.57, 0.58, 0.6]
    assert paired_p_value(values, baseline) == pytest.approx(stats.ttest_rel(values, baseline).pvalue, rel=1e-9)
    for constant in (0.0, 0.1):
        assert paired_p_value([one + constant for one in baseline], baseline) is None
    for short in ([], [0.5]):
        with pytest.raises(DataError, match="two or more pairs"):
            paired_p_value(short, short)
    with pytest.raises(DataError, match="pair them by seed"):
        paired_p_value([0.1, 0.2], [0.1])


def test_what_the_pairs_share_does_not_widen_the_interval_of_a_difference() -> None:
    interval = difference_interval([0.1, 5.1, -9.9], [0.0, 5.0, -10.0])
    assert interval.high - interval.low < 1e-12
    assert interval.estimate == pytest.approx(0.1)


@pytest.mark.parametrize(("low", "high", "excludes"), [(1.0, 1.1, True), (-1.1, -1.0, True), (-1.0, 1.0, False)])
def test_an_interval_says_whether_zero_is_outside(low: float, high: float, excludes: bool) -> None:
    assert mean_interval([low, high, low, high]).excludes_zero() is excludes


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 10), (10, 10), (1, 10), (7, 10), (812, 2000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_of_a_proportion_agrees_with_scipy(successes: int, trials: int, confidence: float) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    interval = proportion_interval(successes, trials, confidence=confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_the_ends_of_wilsons_interval_are_where_the_score_test_just_rejects() -> None:
    interval = proportion_interval(30, 100)
    for end in (interval.low, interval.high):
        assert abs(0.3 - end) / math.sqrt(end * (1 - end) / 100) == pytest.approx(stats.norm.ppf(0.975), rel=1e-9)


def test_a_sum_of_soft_scores_counts_as_successes() -> None:
    low, high = proportion_interval(30, 100), proportion_interval(31, 100)
    assert low.low < proportion_interval(30.4, 100).low < high.low


@pytest.mark.parametrize("values", [[], [0.5]], ids=["none", "one"])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    with pytest.raises(DataError, match=r"expected two or more values .*, got \d; run more seeds"):
        mean_interval(values)
    with pytest.raises(DataError, match="expected two or more values"):
        difference_interval(values, values)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="finite"):
        mean_interval([1.0, math.nan])


def test_values_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(DataError, match="expected as many values as the baseline's 2, got 3"):
        difference_interval([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (math.nan, 3), ("1", 3), (None, 3)])
def test_a_proportion_that_is_none_is_refused(successes: Any, trials: int) -> None:
    with pytest.raises(DataError, match="expected 0 to 3 successes"):
        proportion_interval(successes, trials)


@pytest.mark.parametrize("trials", [0, 4.5, math.nan, "4", True])
def test_trials_that_are_no_count_are_refused(trials: Any) -> None:
    with pytest.raises(DataError, match="expected trials to be a whole number of 1 or more"):
        proportion_interval(0, trials)


@pytest.mark.parametrize("values", [["a", "b"], [[0.0, 1.0], [1.0]], [[0.0, 1.0]], 0.5, [None, 1.0], ["0", "1"]])
def test_what_is_no_flat_list_of_numbers_is_refused(values: Any) -> None:
    for interval in (mean_interval, bootstrap_interval):
        with pytest.raises(DataError, match="expected a flat list of numbers, got"):
            interval(values)
    for interval in (difference_interval, bootstrap_difference, paired_interval):
        with pytest.raises(DataError, match="expected a flat list of numbers, got"):
            interval(values, [0.0, 1.0])
        with pytest.raises(DataError, match="expected a flat list of numbers, got"):
            interval([0.0, 1.0], values)


@pytest.mark.parametrize("interval", [paired_interval, bootstrap_difference])
@pytest.mark.parametrize(("here", "there"), [([60.0, 70.0], [0.4, 0.5]), ([0.6, 0.7], [40.0, 50.0]), ([-0.1], [0.0])])
def test_pairs_of_scores_that_are_no_shares_are_refused(interval: Any, here: list[float], there: list[float]) -> None:
    with pytest.raises(DataError, match=r"expected scores in \[0, 1\], got .*; divide by their cap"):
        interval(here, there)


def test_pairs_of_no_scores_and_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="one score or more, got none"):
        paired_interval([], [])
    with pytest.raises(DataError, match="as many values as the baseline's 1, got 2"):
        paired_interval([0.0, 1.0], [1.0])


@pytest.mark.parametrize("within", [0.5, (0,), ("a", "b"), (0, 1, 2)])
def test_a_range_that_is_no_pair_is_refused(within: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected within="):
        mean_interval([0.1, 0.2], within=within)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan, "0.95", None, True])
def test_a_confidence_outside_zero_to_one_is_refused(confidence: Any) -> None:
    with pytest.raises(ConfigurationError, match="confidence"):
        mean_interval([1.0, 2.0], confidence=confidence)
    with pytest.raises(ConfigurationError, match="confidence"):
        proportion_interval(1, 2, confidence=confidence)


@pytest.mark.parametrize(
    ("only_here", "only_there", "neither", "low", "high"),
    [
        pytest.param(0, 0, 60, -0.0316123, 0.0316123, id="they-agree-on-all"),
        pytest.param(8, 3, 29, -0.0385472, 0.2766424, id="they-disagree"),
        pytest.param(60, 0, 0, 0.9135797, 1.0, id="they-disagree-on-all"),
    ],
)
def test_a_paired_interval_adds_half_an_example_to_each_outcome(
    only_here: int, only_there: int, neither: int, low: float, high: float
) -> None:
    """By hand: with b, c discordant of n, centre (b - c)/(n + 2), variance ((b + c + 1)/(n + 2) - centre^2)/(n + 2)."""
    here = [1.0] * only_here + [0.0] * (only_there + neither)
    there = [0.0] * only_here + [1.0] * only_there + [0.0] * neither
    found = paired_interval(here, there)
    assert found.estimate == pytest.approx((only_here - only_there) / len(here))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-7)


def test_an_interval_of_accuracies_over_seeds_stays_among_accuracies() -> None:
    wide, cut = mean_interval([0.95, 1.0]), mean_interval([0.95, 1.0], within=(0, 1))
    assert wide.high > 1
    assert (cut.low, cut.high) == (wide.low, 1)
    assert difference_interval([0.99, 0.2], [0.0, 0.0], within=(-1, 1)).high == 1
    with pytest.raises(DataError, match=r"expected values within \(0, 1\), got 95 to 97"):
        mean_interval([95.0, 97.0], within=(0, 1))


def test_an_accuracy_of_one_model_varies_with_its_examples_and_of_several_seeds_with_them() -> None:
    one, other = [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    assert accuracy_interval([one]) == proportion_interval(3, 4)
    assert accuracy_interval([one, other]) == mean_interval([0.75, 1.0], within=(0.0, 1.0))
    assert accuracy_interval([one, other]).high == 1.0


@pytest.mark.parametrize("scores", [[], [1.5], [math.nan]], ids=["none", "above-one", "nan"])
def test_an_accuracy_of_what_are_no_scores_is_refused(scores: list[float]) -> None:
    with pytest.raises(DataError, match=r"expected .*, got "):
        accuracy_interval([scores])


def test_the_bootstrap_of_right_and_wrong_is_a_binomial_of_the_observed_accuracy() -> None:
    """60 of 200 right: a resampled accuracy is Binomial(200, 0.3)/200, whose quantiles are known."""
    found = bootstrap_interval([1.0] * 60 + [0.0] * 140, resamples=100_000)
    low, high = stats.binom.ppf([0.025, 0.975], 200, 0.3) / 200
    assert (found.estimate, found.count, found.method) == (0.3, 200, "bootstrap")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1.01 / 200)  # one step of the quantile


def test_soft_scores_that_vary_less_have_a_narrower_interval_than_a_proportion() -> None:
    soft = [0.6, 0.7] * 100
    found, wilson = bootstrap_interval(soft), proportion_interval(sum(soft), len(soft))
    assert found.high - found.low < (wilson.high - wilson.low) / 3
    assert found.low <= 0.65 <= found.high


def test_the_bootstrap_of_pairs_keeps_what_two_models_share() -> None:
    """Models that differ on 12 of 300 examples: far narrower than the interval of either accuracy."""
    there = [1.0] * 150 + [0.0] * 150
    here = [1.0] * 160 + [0.0] * 138 + [1.0] * 2
    found = bootstrap_difference(here, there)
    assert found.estimate == pytest.approx(0.04)
    assert found.excludes_zero()
    single = bootstrap_interval(here)
    assert found.high - found.low < (single.high - single.low) / 2


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    scores = np.random.default_rng(0).uniform(size=50).tolist()
    first = bootstrap_interval(scores, seed=3)
    assert bootstrap_interval(scores, seed=3) == first
    assert bootstrap_interval(scores, seed=4) != first


def test_where_resampling_shows_no_scatter_the_interval_still_has_a_width() -> None:
    assert bootstrap_interval([0.0] * 50) == proportion_interval(0, 50)
    assert bootstrap_difference([1.0] * 50, [1.0] * 50) == paired_interval([1.0] * 50, [1.0] * 50)
    assert bootstrap_interval([0.0] * 50).method == "Wilson"


@pytest.mark.parametrize("scores", [[], [1.5, 0.0], [-0.5, 0.0], [math.inf, 0.0]])
def test_the_bootstrap_refuses_what_are_no_scores(scores: list[float]) -> None:
    with pytest.raises(DataError, match="expected"):
        bootstrap_interval(scores)
    with pytest.raises(DataError, match="expected"):
        bootstrap_difference(scores, [0.0] * len(scores))


@pytest.mark.parametrize(("name", "wrong"), [("resamples", 10), ("resamples", 1e4), ("seed", "a"), ("confidence", 95)])
def test_a_bootstrap_that_cannot_be_run_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        bootstrap_interval([0.0, 1.0], **{name: wrong})  # type: ignore[arg-type]


EXAMPLES, DRAWS = 200, 2000
ACCURACIES = np.linspace(0.05, 0.95, DRAWS)


def covered(intervals: list[Interval], truths: np.ndarray) -> float:
    assert all(-1 <= one.low <= one.estimate <= one.high <= 1 for one in intervals)
    return float(np.mean([one.low <= truth <= one.high for one, truth in zip(intervals, truths, strict=True)]))


@cache
def right_and_wrong(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (EXAMPLES - right)


@pytest.mark.slow
@pytest.mark.parametrize(
    "interval",
    [
        pytest.param(lambda scores: proportion_interval(sum(scores), EXAMPLES), id="Wilson"),
        pytest.param(lambda scores: bootstrap_interval(scores, resamples=1999), id="bootstrap"),
    ],
)
def test_95_percent_intervals_of_an_accuracy_cover_it_95_percent_of_the_time(
    interval: Callable[[list[float]], Interval],
) -> None:
    counts = np.random.default_rng(0).binomial(EXAMPLES, ACCURACIES)
    of_count = cache(lambda right: interval(right_and_wrong(right)))  # a mean does not depend on the order
    assert covered([of_count(int(count)) for count in counts], ACCURACIES) == pytest.approx(0.95, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize(
    "interval",
    [
        pytest.param(paired_interval, id="Agresti-Min"),
        pytest.param(lambda here, there: bootstrap_difference(here, there, resamples=999), id="bootstrap"),
    ],
)
def test_95_percent_intervals_of_a_paired_difference_cover_it_95_percent_of_the_time(
    interval: Callable[[list[float], list[float]], Interval],
) -> None:
    """The model gets some of what the baseline has wrong, and loses some of what it has right."""
    draws = np.random.default_rng(1)
    gains, losses = draws.uniform(0.05, 0.5, size=(2, DRAWS))
    chances = np.stack([(1 - ACCURACIES) * gains, ACCURACIES * losses], axis=1)  # better, worse
    outcomes = draws.multinomial(EXAMPLES, np.column_stack([chances, 1 - chances.sum(1)]))

    @cache
    def of_counts(better: int, worse: int) -> Interval:
        agreed = EXAMPLES - better - worse
        return interval([1.0] * better + [0.0] * (worse + agreed), [0.0] * better + [1.0] * worse + [0.0] * agreed)

    found = [of_counts(int(better), int(worse)) for better, worse, _ in outcomes]
    assert covered(found, chances[:, 0] - chances[:, 1]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_95_percent_t_intervals_over_seeds_cover_the_mean_95_percent_of_the_time(seeds: int) -> None:
    """Accuracies of trained models: scattered by one point around the mean, then measured on the 200 examples."""
    draws = np.random.default_rng(2)
    trained = draws.normal(ACCURACIES, 0.01, size=(seeds, DRAWS)).clip(0, 1)
    measured = draws.binomial(EXAMPLES, trained) / EXAMPLES
    found = [mean_interval(values.tolist(), within=(0, 1)) for values in measured.T]
    assert covered(found, ACCURACIES) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("count", "ranks"), [(6, (1, 6)), (10, (2, 9)), (11, (2, 10)), (100, (40, 61))])
def test_the_interval_of_a_median_lies_between_the_textbooks_ranks(count: int, ranks: tuple[int, int]) -> None:
    found = median_interval(list(range(1, count + 1)))
    assert (found.low, found.high) == ranks
    assert found.estimate == (count + 1) / 2
    inside = stats.binom.cdf(ranks[1] - 1, count, 0.5) - stats.binom.cdf(ranks[0] - 1, count, 0.5)
    assert inside >= 0.95
    narrower = stats.binom.cdf(ranks[1] - 2, count, 0.5) - stats.binom.cdf(ranks[0], count, 0.5)
    assert narrower < 0.95


def test_a_median_of_few_values_may_lie_anywhere_and_infinite_values_count() -> None:
    few = median_interval([1.0, 2.0, math.inf], within=(0.0, math.inf))
    assert (few.estimate, few.low, few.high) == (2.0, 0.0, math.inf)
    many = median_interval([*range(10), *[math.inf] * 10])
    assert many.estimate == math.inf
    assert many.low == 5
    for wrong in ([], [math.nan]):
        with pytest.raises(DataError, match="one number or more for a median"):
            median_interval(wrong)
