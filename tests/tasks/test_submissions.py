"""Predictions are written as their servers take them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from advvl.errors import DataError
from advvl.tasks.submissions import VCR_COLUMNS, write_nlvr2_judgements, write_vcr_scores, write_vqa_answers


def test_answers_are_written_as_their_servers_take_them(tmp_path: Path) -> None:
    write_vqa_answers(tmp_path / "vqa.json", {458752000: "net", 458752001: "no"})
    assert json.loads((tmp_path / "vqa.json").read_text()) == [
        {"question_id": 458752000, "answer": "net"},
        {"question_id": 458752001, "answer": "no"},
    ]
    write_nlvr2_judgements(tmp_path / "nlvr2.csv", {"test1-0-1-0": True, "test1-0-1-1": False})
    assert (tmp_path / "nlvr2.csv").read_text() == "test1-0-1-0,True\ntest1-0-1-1,False\n"


def test_vcrs_file_has_a_row_of_20_scores_for_each_question_in_the_order_of_numbers(tmp_path: Path) -> None:
    scores = {f"test-{n}": [n + k / 7 for k in range(20)] for n in (10, 9, 2)}
    with write_vcr_scores(tmp_path / "vcr.csv", scores).open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["annot_id", *VCR_COLUMNS]
    assert rows[0][1:6] == ["answer_0", "answer_1", "answer_2", "answer_3", "rationale_conditioned_on_a0_0"]
    assert rows[0][-1] == "rationale_conditioned_on_a3_3"
    assert len(rows[0]) == 21
    assert [row[0] for row in rows[1:]] == ["test-2", "test-9", "test-10"]
    assert [list(map(float, row[1:])) for row in rows[1:]] == [scores[row[0]] for row in rows[1:]]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({}, "none; is the split empty"),
        ({"test-1": [0.0] * 8}, "20 finite scores of 'test-1'"),
        ({"test-1": [0.0] * 19 + [math.nan]}, "20 finite scores of 'test-1'"),
        ({"test": [0.0] * 20}, "ends in a number, as test-17, got 'test'"),
        ({17: [0.0] * 20}, "ends in a number, as test-17, got 17"),
    ],
)
def test_scores_that_vcrs_server_would_not_take_are_not_written(tmp_path: Path, scores: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_vcr_scores(tmp_path / "vcr.csv", scores)
    assert not list(tmp_path.iterdir())
