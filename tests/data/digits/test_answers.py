"""Soft targets in VQA's format."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from advvl.data.digits.answers import ANSWERS, certain_target
from advvl.data.targets import annotator_score, soft_targets
from advvl.errors import DataError


@pytest.mark.parametrize("count", range(11))
def test_an_annotator_score_is_the_mean_over_the_ways_to_leave_one_out(count: int) -> None:
    gave = [1] * count + [0] * (10 - count)
    left = [min(sum(nine) / 3, 1.0) for nine in combinations(gave, 9)]
    assert annotator_score(count) == pytest.approx(sum(left) / 10)


@pytest.mark.parametrize("count", [-1, 11])
def test_an_impossible_count_of_annotators_is_refused(count: int) -> None:
    with pytest.raises(DataError, match=str(count)):
        annotator_score(count)


def test_targets_become_rows_of_scores() -> None:
    rows = soft_targets([{"labels": [2, 0], "scores": [0.3, 1.0]}, {"labels": [], "scores": []}], 4)
    assert torch.equal(rows, torch.tensor([[1.0, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_a_certain_answer_has_score_one_and_nothing_else_has_any() -> None:
    rows = soft_targets([certain_target(answer) for answer in ANSWERS], len(ANSWERS))
    assert torch.equal(rows, torch.eye(len(ANSWERS)))


@pytest.mark.parametrize(
    "target",
    [
        {"labels": [4], "scores": [1.0]},
        {"labels": [-1], "scores": [1.0]},
        {"labels": [0], "scores": [1.5]},
        {"labels": [0], "scores": [float("nan")]},
        {"labels": [0, 1], "scores": [1.0]},
    ],
    ids=["too-large", "negative", "score-above-1", "nan", "lengths"],
)
def test_a_malformed_target_is_refused(target: dict[str, list[float]]) -> None:
    with pytest.raises(DataError, match="target 0"):
        soft_targets([target], 4)
