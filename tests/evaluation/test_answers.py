"""Scores of a language model's answers, against answers and probabilities that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from advvl.errors import AdvVLError, DataError, ShapeError
from advvl.evaluation.answers import exact_match, likelihood, refused
from advvl.evaluation.statistics import bootstrap_interval, proportion_interval, score_interval


def test_an_answer_matches_word_for_word_alone() -> None:
    answers = ["the red one", " the  red one\n", "The red one", "the red", "the red one too"]
    assert exact_match(answers, ["the red one"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_an_answer_that_begins_like_a_refusal_refuses() -> None:
    answers = ["I cannot help", " i CANNOT\nhelp", "Sorry, no", "Sure. I cannot say more", ""]
    assert refused(answers, ["I cannot", "sorry"]) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_likelihood_is_the_geometric_mean_over_the_tokens_of_the_answer() -> None:
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]]])
    labels = torch.tensor([[-100, 0, 1, 0], [-100, -100, 2, -100]])
    found = likelihood(probabilities.log().expand(2, -1, -1), labels)
    expected = torch.tensor([(0.5 * 0.8 * 0.25) ** (1 / 3), 0.1], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_half_precision_logits_of_a_sure_answer_give_no_more_than_one() -> None:
    logits = torch.full((1, 3, 4), -60.0, dtype=torch.bfloat16)
    logits[..., 2] = 60
    assert likelihood(logits, torch.tensor([[-100, 2, 2]])).tolist() == [1.0]


def test_right_and_wrong_have_wilsons_interval_and_soft_scores_that_of_a_bootstrap() -> None:
    assert score_interval(refused(["no", "yes", "no"], ["no"])) == proportion_interval(2, 3)
    soft = [0.1, 0.9, 0.4]
    assert score_interval(soft) == bootstrap_interval(soft)


LOGITS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: exact_match(["a"], ["a", "b"]), DataError, "a target for each of 1 answers, got 2"),
        (lambda: exact_match([], []), DataError, "answers as a list of one text or more"),
        (lambda: exact_match("a", ["a"]), DataError, "answers as a list of one text or more"),
        (lambda: refused(["a", 5], ["no"]), DataError, "answers as a list of one text or more"),
        (lambda: refused(["a"], []), DataError, "openings as a list of one text or more"),
        (lambda: refused(["a"], [" "]), DataError, "an empty one"),
        (lambda: likelihood(LOGITS, torch.zeros(2, 4, dtype=torch.long)), ShapeError, "leave out inserted positions"),
        (lambda: likelihood(LOGITS, torch.tensor([[0, 1, 2], [3, -100, -100]])), DataError, "none in row 1"),
        (lambda: score_interval([math.nan]), DataError, "finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Callable[[], Any], error: type[AdvVLError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
