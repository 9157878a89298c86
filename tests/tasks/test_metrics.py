"""Accuracy of answers in words, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from advvl.data.lxmert.answers import AnswerTable
from advvl.data.lxmert.questions import Statement, VisualQuestion
from advvl.errors import DataError
from advvl.evaluation.objectives import score
from advvl.tasks.metrics import (
    gqa_accuracy,
    nlvr2_accuracy,
    nlvr2_consistency,
    vqa_accuracy,
)

VQA = [
    VisualQuestion(1, "a", "what is it", {"net": 1.0, "netting": 0.3}),
    VisualQuestion(2, "a", "is it", {"yes": 0.9, "no": 0.6}),
    VisualQuestion(3, "b", "where", {}),
    VisualQuestion(4, "b", "who", {"man": 0.6}),
]
GQA = [VisualQuestion(name, "a", "is it", {answer: 1.0}) for name, answer in (("x", "yes"), ("y", "no"), ("z", "sea"))]
NLVR2 = [
    Statement(name, name, ("a", "b"), "it is", label)
    for name, label in (
        ("dev-1-0-0", 1),
        ("dev-1-1-0", 0),
        ("dev-1-0-1", 1),
        ("dev-1-1-1", 0),
        ("dev-2-0-0", 0),
        ("test1-1-0-0", 1),
    )
]


def test_vqa_counts_the_score_of_each_answer() -> None:
    answers = {1: "netting", 2: "yes", 3: "here", 4: "woman"}
    assert vqa_accuracy(answers, VQA) == pytest.approx((0.3 + 0.9) / 4)


def test_answers_in_words_and_logits_against_targets_score_the_same() -> None:
    table = AnswerTable(("yes", "no", "net", "netting", "man", "here"))
    logits = torch.randn(4, len(table), generator=torch.Generator().manual_seed(1))
    targets = table.targets([question.label or {} for question in VQA])
    answers: dict[int | str, str] = {
        question.question_id: table.answers[int(row.argmax())] for question, row in zip(VQA, logits, strict=True)
    }
    assert vqa_accuracy(answers, VQA) == pytest.approx(score(logits, targets).mean().item())


def test_gqa_counts_answers_that_are_the_right_ones_word_for_word() -> None:
    assert gqa_accuracy({"x": "yes", "y": "No", "z": "sea"}, GQA) == pytest.approx(2 / 3)


def test_nlvr2_counts_sentences_and_then_sentences_right_of_every_pair() -> None:
    truth = {statement.identifier: bool(statement.label) for statement in NLVR2}
    assert nlvr2_accuracy(truth, NLVR2) == nlvr2_consistency(truth, NLVR2) == 1.0
    wrong = truth | {"dev-1-0-0": False, "dev-1-1-0": True}
    assert nlvr2_accuracy(wrong, NLVR2) == pytest.approx(4 / 6)
    assert nlvr2_consistency(wrong, NLVR2) == pytest.approx(
        3 / 4
    )  # dev-1-*-0, but not dev-1-*-1, dev-2-0-*, test1-1-0-*


def test_labels_by_identifier_are_as_good_as_statements() -> None:
    labels = {statement.identifier: bool(statement.label) for statement in NLVR2}
    judged = labels | {"dev-1-0-0": False}
    for metric in (nlvr2_accuracy, nlvr2_consistency):
        assert metric(judged, labels) == metric(judged, NLVR2) < 1


def test_a_statement_asked_twice_is_refused() -> None:
    with pytest.raises(DataError, match="2 statements of different identifiers, got 1"):
        nlvr2_accuracy({"dev-1-0-0": True}, [NLVR2[0], NLVR2[0]])


Metric = Callable[[Any, Any], float]
CASES: list[tuple[Metric, list[Any], dict[Any, Any]]] = [
    (vqa_accuracy, VQA, dict.fromkeys((1, 2, 3, 4), "yes")),
    (gqa_accuracy, GQA, dict.fromkeys("xyz", "yes")),
    (nlvr2_accuracy, NLVR2, {statement.identifier: True for statement in NLVR2}),
    (nlvr2_consistency, NLVR2, {statement.identifier: True for statement in NLVR2}),
]


@pytest.mark.parametrize(("metric", "asked", "answers"), CASES, ids=[metric.__name__ for metric, _, _ in CASES])
def test_what_was_not_asked_or_not_answered_is_refused(
    metric: Metric, asked: list[Any], answers: dict[Any, Any]
) -> None:
    assert 0 <= metric(answers, asked) <= 1
    first = next(iter(answers))
    with pytest.raises(DataError, match=f"1 of them unanswered, 0 answers to others, such as {first!r}"):
        metric({key: value for key, value in answers.items() if key != first}, asked)
    with pytest.raises(DataError, match="0 of them unanswered, 1 answers to others, such as 'other'"):
        metric(answers | {"other": "yes"}, asked)
    with pytest.raises(DataError, match="0 asked"):
        metric({}, [])
    with pytest.raises(DataError, match=r"expected a label .* test split"):
        metric(answers, [replace(asked[0], label=None), *asked[1:]])


def test_a_question_of_several_answers_is_not_gqas() -> None:
    with pytest.raises(DataError, match="question 2, got 2"):
        gqa_accuracy({2: "yes"}, VQA[1:2])


def test_an_identifier_of_another_form_has_no_sentence_to_group_by() -> None:
    with pytest.raises(DataError, match=r"split-set-pair-sentence.*got 'dev-1'"):
        nlvr2_consistency({"dev-1": True}, [replace(NLVR2[0], identifier="dev-1")])
