"""Question files, and answer tables: read as published, written back the same, refused where malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advvl.data.lxmert.answers import (
    AnswerTable,
    PretrainingAnswer,
    read_answers,
    read_pretraining_answers,
    write_answers,
    write_pretraining_answers,
)
from advvl.data.lxmert.questions import (
    Statement,
    VisualQuestion,
    read_questions,
    read_statements,
    write_questions,
    write_statements,
)
from advvl.errors import DataError

VQA = {
    "answer_type": "other",
    "img_id": "COCO_train2014_000000458752",
    "label": {"net": 1, "netting": 0.3},
    "question_id": 458752000,
    "question_type": "what is this",
    "sent": "What is this photo taken looking through?",
}
GQA = {"img_id": "n578237", "label": {"yes": 1.0}, "question_id": "201307251", "sent": "Is the sky dark?"}
NLVR2 = {
    "identifier": "dev-850-0-0",
    "img0": "dev-850-0-img0",
    "img1": "dev-850-0-img1",
    "label": 0,
    "sent": "The right image shows a curving walkway of dark glass.",
    "uid": "nlvr2_dev_0",
}


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_questions_are_read_as_published(tmp_path: Path) -> None:
    vqa, gqa = read_questions(written(tmp_path / "q.json", [VQA, GQA]))
    assert vqa == VisualQuestion(
        458752000,
        "COCO_train2014_000000458752",
        "What is this photo taken looking through?",
        {"net": 1.0, "netting": 0.3},
        "other",
        "what is this",
    )
    assert gqa == VisualQuestion("201307251", "n578237", "Is the sky dark?", {"yes": 1.0})


def test_sentences_are_read_as_published(tmp_path: Path) -> None:
    (statement,) = read_statements(written(tmp_path / "s.json", [NLVR2]))
    images = ("dev-850-0-img0", "dev-850-0-img1")
    assert statement == Statement("nlvr2_dev_0", "dev-850-0-0", images, NLVR2["sent"], 0)  # type: ignore[arg-type]


def test_a_test_file_has_no_labels(tmp_path: Path) -> None:
    unknown = {name: value for name, value in GQA.items() if name != "label"}
    assert read_questions(written(tmp_path / "q.json", [unknown]))[0].label is None
    unknown = {name: value for name, value in NLVR2.items() if name != "label"}
    assert read_statements(written(tmp_path / "s.json", [unknown]))[0].label is None


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)
QUESTIONS = st.lists(
    st.builds(
        VisualQuestion,
        question_id=st.integers() | TEXTS,
        image_id=TEXTS,
        sentence=TEXTS,
        label=st.none() | st.dictionaries(TEXTS, st.floats(0, 1)),
        answer_type=st.none() | TEXTS,
        question_type=st.none() | TEXTS,
    ),
    min_size=1,
    unique_by=lambda question: question.question_id,
)
STATEMENTS = st.lists(
    st.builds(
        Statement,
        uid=TEXTS,
        identifier=TEXTS,
        image_ids=st.tuples(TEXTS, TEXTS),
        sentence=TEXTS,
        label=st.sampled_from([None, 0, 1]),
    ),
    min_size=1,
    unique_by=lambda statement: statement.uid,
)


@pytest.mark.slow
@given(questions=QUESTIONS)
@settings(max_examples=30, deadline=None)
def test_questions_are_the_same_after_their_file(
    tmp_path_factory: pytest.TempPathFactory, questions: list[VisualQuestion]
) -> None:
    path = tmp_path_factory.mktemp("q") / "q.json"
    write_questions(path, questions)
    assert read_questions(path) == questions


@pytest.mark.slow
@given(statements=STATEMENTS)
@settings(max_examples=30, deadline=None)
def test_sentences_are_the_same_after_their_file(
    tmp_path_factory: pytest.TempPathFactory, statements: list[Statement]
) -> None:
    path = tmp_path_factory.mktemp("s") / "s.json"
    write_statements(path, statements)
    assert read_statements(path) == statements


def without(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != name}


MALFORMED: dict[str, tuple[Callable[[Path], object], list[Any], str]] = {
    "not an object": (read_questions, [VQA, "text"], "entry 1: expected an object"),
    "no id": (read_questions, [GQA, without(VQA, "question_id")], "entry 1: field 'question_id': .* none among answer"),
    "a truth for an id": (read_questions, [VQA | {"question_id": True}], "entry 0: field 'question_id'.*True"),
    "no image": (read_questions, [VQA | {"img_id": ""}], "entry 0: field 'img_id': expected a text.*''"),
    "a number for words": (read_questions, [VQA | {"sent": 3}], "entry 0: field 'sent'.*got 3"),
    "a list of answers": (read_questions, [VQA | {"label": ["net"]}], r"entry 0: field 'label'.*\['net'\]"),
    "a score above 1": (read_questions, [VQA | {"label": {"net": 1.5}}], "entry 0: field 'label'.*1.5"),
    "a score that is not a number": (read_questions, [VQA | {"label": {"net": float("nan")}}], "field 'label'.*nan"),
    "a score in words": (read_questions, [VQA | {"label": {"net": "1"}}], "field 'label'"),
    "a type in numbers": (read_questions, [VQA | {"answer_type": 1}], "entry 0: field 'answer_type'"),
    "a question twice": (read_questions, [VQA, GQA, VQA], "entry 2: field 'question_id'.*458752000"),
    "no question": (read_questions, [], "one question or more, got none"),
    "another task's": (read_questions, [NLVR2], "entry 0: field 'question_id'.*none among identifier, img0"),
    "one image": (read_statements, [without(NLVR2, "img1")], "entry 0: field 'img1'"),
    "a label of 2": (read_statements, [NLVR2 | {"label": 2}], "entry 0: field 'label'.*got 2"),
    "a label in words": (read_statements, [NLVR2 | {"label": "True"}], "field 'label'.*True"),
    "a label of a truth": (read_statements, [NLVR2 | {"label": True}], "field 'label'.*True"),
    "a sentence twice": (read_statements, [NLVR2, NLVR2], "entry 1: field 'uid'"),
    "VQA's": (read_statements, [VQA], "entry 0: field 'label'|entry 0: field 'uid'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_named(tmp_path: Path, case: str) -> None:
    read, entries, message = MALFORMED[case]
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        read(written(tmp_path / "a.json", entries))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "check the path"),
        ('[{"uid": "a"', "is the file whole"),
        (b"[\xff]", "is the file whole"),
        ("{}", "got a JSON dict"),
        ('[{"uid": "a", "uid": "b"}]', "'uid' more than once"),
    ],
    ids=["missing", "cut short", "not UTF-8", "no list", "a field twice"],
)
def test_a_file_that_is_no_list_of_questions_is_refused(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        read_statements(path)


@pytest.fixture
def table(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "trainval_ans2label.json", tmp_path / "trainval_label2ans.json"
    write_answers(*paths, AnswerTable(("no", "yes", "net")))
    return paths


def test_a_table_is_read_from_both_of_its_files(table: tuple[Path, Path]) -> None:
    assert json.loads(table[0].read_text()) == {"no": 0, "yes": 1, "net": 2}
    assert json.loads(table[1].read_text()) == ["no", "yes", "net"]
    assert read_answers(*table, size=3) == AnswerTable(("no", "yes", "net"))
    assert read_answers(*table).numbers["net"] == 2


@pytest.mark.parametrize(
    ("numbered", "listed", "message"),
    [
        ({"no": 0, "yes": 1, "net": 2}, ["yes", "no", "net"], "expected 'no' under 0.*got 'yes'.*UNITER numbers"),
        ({"no": 0, "yes": 1}, ["no", "yes", "net"], "as many answers .* 3, got 2"),
        ({"no": 0, "yes": 1, "net": 3}, ["no", "yes", "net"], r"0\.\.2 for 'net'.*got 3"),
        ({"no": 0, "yes": 1, "net": 1}, ["no", "yes", "net"], "expected 'net' under 1.*got 'yes'"),
        ({"no": 0, "yes": 1, "net": True}, ["no", "yes", "net"], "for 'net'.*got True"),
        ({"no": 0, "yes": 1}, ["no", "yes", "no"], "as many answers"),
        ({"no": 0}, [0], "entry 0: expected an answer, got 0"),
        ({}, [], "one answer or more"),
        ([], ["no"], "got a JSON list"),
    ],
    ids=["order", "missing", "range", "shared", "truth", "twice", "numbers", "empty", "list"],
)
def test_files_that_are_no_bijection_are_refused(
    table: tuple[Path, Path], numbered: Any, listed: Any, message: str
) -> None:
    written(table[0], numbered)
    written(table[1], listed)
    with pytest.raises(DataError, match=message):
        read_answers(*table)


def test_a_table_of_another_size_is_refused(table: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"expected 3129 answers .* got 3"):
        read_answers(*table, size=3129)


def test_a_table_made_by_hand_has_every_answer_once() -> None:
    with pytest.raises(DataError, match="'b' more than once"):
        AnswerTable(("a", "b", "b"))


def test_targets_are_scores_in_the_tables_order() -> None:
    table = AnswerTable(("no", "yes", "net"))
    targets = table.targets([{"net": 0.6, "no": 0.3}, {}, {"yes": 1.0}])
    torch.testing.assert_close(targets, torch.tensor([[0.3, 0, 0.6], [0, 0, 0], [0, 1, 0]]), rtol=0, atol=0)


def test_an_answer_that_the_table_lacks_is_refused_or_left_out_by_option() -> None:
    table = AnswerTable(("no", "yes"))
    with pytest.raises(DataError, match=r"'sea'.*leave out"):
        table.targets([{"yes": 1.0}, {"sea": 1.0}])
    left = table.targets([{"yes": 1.0}, {"sea": 1.0}, {"sea": 0.3, "no": 0.9}], unknown="leave out")
    assert torch.equal(left, torch.tensor([[0, 1.0], [0, 0], [0.9, 0]]))


def test_the_answers_of_pretraining_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "all_ans.json"
    answers = (PretrainingAnswer("yes", ("vqa", "gqa")), PretrainingAnswer("a net", ()))
    write_pretraining_answers(path, answers)
    assert json.loads(path.read_text())[0] == {"ans": "yes", "dsets": ["vqa", "gqa"]}
    assert read_pretraining_answers(path, size=2) == answers
    with pytest.raises(DataError, match=r"expected 9500 answers .* got 2"):
        read_pretraining_answers(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["yes"], "entry 0: expected an object"),
        ([{"ans": 3, "dsets": []}], "entry 0: field 'ans'"),
        ([{"ans": "yes", "dsets": "vqa"}], "entry 0: field 'dsets'"),
        ([{"ans": "yes", "dsets": []}] * 2, "entry 1: field 'ans'"),
    ],
    ids=["text", "answer", "sets", "twice"],
)
def test_malformed_answers_of_pretraining_are_named(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pretraining_answers(written(tmp_path / "all_ans.json", entries), size=None)
