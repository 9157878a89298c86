"""Tests between models, against sums worked by hand, and their errors on simulated data."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
import pytest

from advvl.errors import DataError
from advvl.evaluation.comparisons import holm, mcnemar


def scores(better: int, worse: int, both: int, neither: int) -> tuple[list[float], list[float]]:
    """Scores of a model and a baseline with so many examples of each outcome."""
    here = [1.0] * better + [0.0] * worse + [1.0] * both + [0.0] * neither
    there = [0.0] * better + [1.0] * worse + [1.0] * both + [0.0] * neither
    return here, there


@pytest.mark.parametrize(("better", "worse"), [(8, 3), (3, 8), (6, 0), (5, 5), (1, 0), (40, 20)])
def test_mcnemar_is_the_binomial_test_of_the_examples_that_differ(better: int, worse: int) -> None:
    found = mcnemar(*scores(better, worse, both=20, neither=9))
    total, few = better + worse, min(better, worse)
    tail = sum(comb(total, k) for k in range(few + 1)) / 2**total
    assert (found.better, found.worse) == (better, worse)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_models_that_agree_on_every_example_do_not_differ() -> None:
    assert mcnemar([1, 0, 1], [1, 0, 1]).p_value == 1.0


def test_mcnemar_rejects_equal_models_at_most_as_often_as_it_says() -> None:
    """Exactly, over all outcomes: 12 discordant examples, either kind as likely."""
    chances = [comb(12, better) / 2**12 for better in range(13)]
    p_values = [mcnemar(*scores(better, 12 - better, 0, 0)).p_value for better in range(13)]
    for level in (0.01, 0.05, 0.1, 0.3):
        assert sum(c for c, p in zip(chances, p_values, strict=True) if p <= level) <= level


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        pytest.param([1, 0], [1], "same examples, one or more, got 2 and 1", id="other-lengths"),
        pytest.param([], [], "same examples", id="none"),
        pytest.param([[1]], [[0]], "a flat list", id="nested"),
        pytest.param([0.6, 1], [0, 1], "expected scores of 0 or 1, got others; .* bootstrap_difference", id="soft"),
        pytest.param([float("nan"), 1], [0, 1], "expected scores of 0 or 1", id="not-a-number"),
    ],
)
def test_scores_that_mcnemar_cannot_take_are_refused(here: list[float], there: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mcnemar(here, there)


def test_holms_correction_by_hand() -> None:
    # Sorted: 0.01·4, 0.02·3, 0.03·2, 0.04·1; the third and fourth may not fall below the second.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx((0.06, 0.04, 0.06, 0.06))
    assert holm([0.5, 0.9]) == (1.0, 1.0)
    assert holm([0.2]) == (0.2,)
    assert holm([]) == ()


def test_holm_keeps_the_chance_of_any_false_difference_at_its_level() -> None:
    """20,000 families of five comparisons without a difference: 5 % of them, within four standard errors."""
    draws = np.random.default_rng(0).uniform(size=(20_000, 5))
    false = np.mean([min(holm(family)) <= 0.05 for family in draws])
    assert abs(false - 0.05) < 4 * np.sqrt(0.05 * 0.95 / len(draws))


@pytest.mark.parametrize("wrong", [[-0.1], [1.1], [float("nan")]])
def test_p_values_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(DataError, match=r"expected a flat list of p-values in \[0, 1\]"):
        holm(wrong)


@pytest.mark.parametrize("wrong", [["a"], [[0.5]], 0.5, [None], [[0.0], [0.0, 1.0]]])
def test_what_is_no_flat_list_of_numbers_is_refused(wrong: Any) -> None:
    for refused in (lambda: holm(wrong), lambda: mcnemar(wrong, [1.0]), lambda: mcnemar([1.0], wrong)):
        with pytest.raises(DataError, match="expected a flat list of numbers, got"):
            refused()
