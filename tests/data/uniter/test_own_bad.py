"""Records that no model can use: each is refused with its number, its key and what to do, or skipped and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advvl.data.lxmert.answers import AnswerTable
from advvl.data.uniter.own import (
    caption_sources,
    nlvr2_source,
    referring_source,
    retrieval_source,
    vcr_evaluation_source,
    vcr_source,
    ve_source,
    vqa_source,
)
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import ConfigurationError, DataError

TOKENIZER = build_tokenizer(["what is it ?", "two red dogs run"])
ANSWERS = AnswerTable(("red", "blue"))
IMAGE = {"features": np.ones((2, 5), "f4"), "boxes": [[0, 0, 40, 30], [10, 5, 20, 15]], "size": (40, 30)}
LABELS = {"soft_labels": [[0.5, 0.5, 0], [0, 0.1, 0.9]]}
NAN = np.full((2, 5), np.nan, "f4")

Make = Callable[..., Any]
TASKS: dict[str, tuple[dict[str, Any], Make]] = {
    "vqa": (
        {"text": "what is it ?", "answers": "red", **IMAGE},
        lambda r, **o: vqa_source(r, TOKENIZER, answers=ANSWERS, **o),
    ),
    "ve": ({"text": "two dogs", "label": "neutral", **IMAGE}, lambda r, **o: ve_source(r, TOKENIZER, **o)),
    "nlvr2": (
        {"text": "two dogs", "left": IMAGE, "right": IMAGE, "target": 1},
        lambda r, **o: nlvr2_source(r, TOKENIZER, **o),
    ),
    "vcr": (
        {
            "question": "what is it ?",
            "answers": ["red", "dogs", "two", "it"],
            "answer": 3,
            "rationales": ["is", "is", "it", "it"],
            "rationale": 0,
            **IMAGE,
        },
        lambda r, **o: vcr_source(r, TOKENIZER, **o),
    ),
    "retrieval": ({"text": ["two dogs", "it"], **IMAGE}, lambda r, **o: retrieval_source(r, TOKENIZER, **o).pairs),
    "referring": (
        {"text": "two dogs", "target": 1, **IMAGE},
        lambda r, **o: referring_source(r, TOKENIZER, boxes=True, **o),
    ),
    "captions": (
        {"text": "two dogs", **IMAGE, **LABELS},
        lambda r, **o: caption_sources(r, TOKENIZER, tasks=["mrc"], **o)["mrc"],
    ),
}
GONE = object()

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no text": ("vqa", {"text": GONE}, r"expected the key 'text', got 'answers', 'features', 'boxes', 'size'; add it"),
    "no features": ("ve", {"features": GONE}, "expected the key 'features', got .*; add it, or leave the record out"),
    "no boxes": ("captions", {"boxes": None}, "expected the key 'boxes'"),
    "no second image": ("nlvr2", {"right": GONE}, "expected the key 'right'"),
    "no target": ("referring", {"target": GONE}, "expected the key 'target'"),
    "no answer": ("vcr", {"answer": GONE}, "expected the key 'answer'"),
    "no labels": ("captions", {"soft_labels": GONE}, "expected the key 'soft_labels'"),
    "bytes": ("vqa", {"text": b"what"}, "text: expected a text of one word or more, got b'what'; correct it"),
    "empty text": ("ve", {"text": ""}, "text: expected a text of one word or more, got ''"),
    "blank text": ("nlvr2", {"text": " \t"}, "text: expected a text of one word or more"),
    "no caption": ("retrieval", {"text": []}, r"text: expected a list of one text or more, got 0"),
    "one empty caption": (
        "retrieval",
        {"text": ["two", ""]},
        r"text\[1\]: expected a text of one word or more, got ''",
    ),
    "a caption that is a number": ("retrieval", {"text": 3}, "text: expected a list of one text or more, got 3"),
    "not a number": ("vqa", {"features": NAN}, "expected finite features, got some that are not"),
    "too large": ("vqa", {"features": np.full((2, 5), 1e300)}, "expected finite features"),
    "features of one region": ("ve", {"features": np.ones(5)}, r"expected features \(R, F\) .* got \(5,\)"),
    "no region": ("ve", {"features": np.ones((0, 5)), "boxes": np.ones((0, 4))}, "of one region or more"),
    "fewer boxes": ("captions", {"boxes": [[0, 0, 4, 4]]}, r"got \(2, 5\) and \(1, 4\)"),
    "text as features": ("vqa", {"features": "x.npy"}, "expected features as an array of numbers, got str"),
    "another width": ("vqa", {"features": np.ones((2, 6))}, "expected 5 features .* as in records before, got 6"),
    "widths of two images": (
        "nlvr2",
        {"right": {**IMAGE, "features": np.ones((2, 6))}},
        "expected 5 features .* as in records before, got 6",
    ),
    "other classes": (
        "captions",
        {"soft_labels": [[0.5, 0.5]] * 2},
        "expected 5 features and 3 classes .* got 5 and 2",
    ),
    "labels of one region": (
        "captions",
        {"soft_labels": [[0.5, 0.3, 0.2]]},
        r"expected labels \(2, C\) of 2 regions, got \(1, 3\)",
    ),
    "answer for answers": (
        "vqa",
        {"answers": GONE, "answer": "red"},
        "expected the field answers, got answer; rename it",
    ),
    "labels above 1": ("captions", {"soft_labels": [[5, 0, 0]] * 2}, r"soft_labels: expected \(R, C\) in \[0, 1\]"),
    "complex features": ("vqa", {"features": torch.ones(2, 5, dtype=torch.cfloat)}, "expected features as an array"),
    "sparse features": ("vqa", {"features": torch.ones(2, 5).to_sparse()}, "expected features as an array of numbers"),
    "features of no memory": ("vqa", {"features": torch.ones(2, 5, device="meta")}, "expected features as an array"),
    "half of a character": ("vqa", {"text": "what is \ud800 ?"}, "expected a text of whole characters"),
    "nan box": ("vqa", {"boxes": [[0, 0, np.nan, 3]] * 2}, "expected finite boxes"),
    "reversed box": (
        "vqa",
        {"boxes": [[9, 0, 3, 3]] * 2},
        r"x1 <= x2 and y1 <= y2, got \[9.0, 0.0, 3.0, 3.0\]; give corners",
    ),
    "outside": ("vqa", {"boxes": [[0, 0, 50, 3]] * 2}, "expected boxes x1, y1, x2, y2 inside the image"),
    "pixels without size": ("vqa", {"size": GONE}, r"give size=\(width, height\) for pixels"),
    "parts with size": ("vqa", {"boxes": [[0, 0, 1, 1]] * 2}, r"got all in \[0, 1\] already; leave size out"),
    "size of one side": ("vqa", {"size": 40}, r"expected size as \(width, height\) in pixels, got 40"),
    "unknown answer": ("vqa", {"answers": "green"}, "answers: expected an answer of the table's 2, got 'green'"),
    "nine people": ("vqa", {"answers": ["red"] * 9}, "answers: expected one answer, ten people's, or scores .* got 9"),
    "answer that is a number": ("vqa", {"answers": 3}, "answers: expected one answer, .* got 3"),
    "score above 1": ("vqa", {"answers": {"red": 2.0}}, r"answers: expected labels in 0\.\.1 and scores in \[0, 1\]"),
    "unknown label": ("ve", {"label": "true"}, "label: expected an answer of the table's 3, got 'true'"),
    "label that is a number": ("ve", {"label": 2}, "label: expected one of contradiction, entailment, neutral"),
    "target of 2": ("nlvr2", {"target": 2}, r"target: expected a number in 0\.\.1, got 2; correct it"),
    "target that is a text": ("nlvr2", {"target": "True"}, r"target: expected a number in 0\.\.1, got 'True'"),
    "region that is not there": ("referring", {"target": 2}, r"target: expected a number in 0\.\.1, got 2"),
    "region before the first": ("referring", {"target": -1}, r"target: expected a number in 0\.\.1, got -1"),
    "box of three": ("referring", {"box": [1, 2, 3]}, r"box: expected x1, y1, x2, y2, got shape \(3,\)"),
    "box outside": ("referring", {"box": [0, 0, 90, 3]}, "box: expected boxes x1, y1, x2, y2 inside the image"),
    "three choices": ("vcr", {"answers": ["red"] * 3}, "answers: expected a list of 4, got 3"),
    "an empty choice": ("vcr", {"rationales": ["is", "", "it", "it"]}, r"rationales\[1\]: expected a text of one word"),
    "choice of 4": ("vcr", {"rationale": 4}, r"rationale: expected a number in 0\.\.3, got 4"),
    "an id that is a list": ("vqa", {"id": [1]}, r"id: expected a text or a whole number, got \[1\]"),
    "an empty id": ("vqa", {"id": ""}, "id: expected a text or a whole number, got ''"),
    "the id of the first": (
        "vqa",
        {"id": 0},
        "id: expected one that no record before has, got '0'; give all records an id",
    ),
    "too long": (
        "vqa",
        {"text": "dogs " * 9},
        "expected at most max_length=8 word pieces, got 9; shorten the text, or raise",
    ),
    "too long with choices": (
        "vcr",
        {"rationales": ["is", "it " * 4, "it", "it"]},
        "expected at most max_length=8 .* got 9",
    ),
}


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**record, **changes}.items() if value is not GONE}


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_cannot_be_used_is_refused_with_its_number_or_skipped_and_listed(name: str) -> None:
    task, changes, message = BAD[name]
    record, make = TASKS[task]
    records = [record, changed(record, changes), record]
    with pytest.raises(DataError, match=rf"^record 1: .*{message}"):
        make(records, max_length=8)
    source = make(records, max_length=8, skip_bad=True)
    (skipped,) = source.examples.skipped
    assert skipped.startswith("record 1: ")
    keys = {source.examples.key(number) for number in range(len(source.examples))}
    assert {key.partition(".")[0] for key in keys} == {"0", "2"}
    whole = make([record, record], max_length=8)
    assert source.examples.lengths.tolist() == whole.examples.lengths.tolist()


def test_a_record_that_is_left_out_says_nothing_of_the_width_of_others() -> None:
    record, make = TASKS["captions"]
    wide = changed(record, {"features": np.ones((2, 9)), "text": ""})
    source = make([wide, record, record], skip_bad=True)
    assert len(source.examples.skipped) == 1
    assert {source.examples.key(number).partition(".")[0] for number in range(len(source.examples))} == {"1", "2"}


def test_features_with_a_graph_give_batches_without_one() -> None:
    record, make = TASKS["vqa"]
    source = make([changed(record, {"features": torch.ones(2, 5, requires_grad=True)})])
    assert not any(value.requires_grad for value in source.batch([0]).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("options", [{"max_length": "9"}, {"max_length": 0}, {"max_length": True}, {"skip_bad": "yes"}])
def test_lengths_and_choices_of_another_type_are_refused(options: dict[str, Any]) -> None:
    record, make = TASKS["captions"]
    with pytest.raises(ConfigurationError, match=f"expected {next(iter(options))}"):
        make([record], **options)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_record_is_refused(task: str) -> None:
    record, make = TASKS[task]
    with pytest.raises(DataError, match=r"record 0: expected a dict, got '(text|question)'"):
        make(list(record))
    for records in (record, 3, None):
        with pytest.raises(DataError, match="expected records in a list, a generator, or a Dataset"):
            make(records)
    for records in ([], iter([])):
        with pytest.raises(DataError, match="expected one example or more, got 0"):
            make(records)
    with pytest.raises(
        DataError, match=r"expected one example or more, got 1 that cannot be used; the first is .record 0"
    ):
        make([{}], skip_bad=True)


def test_a_line_is_named_by_its_file_and_number(tmp_path: Path) -> None:
    record = {**TASKS["vqa"][0], "features": np.ones((2, 5)).tolist()}
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps(record), "", "{", json.dumps({**record, "text": ""}), "[3]", json.dumps(record)]
    path.write_text("\n".join(lines))
    make = TASKS["vqa"][1]
    with pytest.raises(DataError, match=r"questions\.jsonl, line 3: expected JSON, got .*; correct the line"):
        make(path)
    source = make(path, skip_bad=True)
    assert [one.partition("questions.jsonl, ")[2][:7] for one in source.examples.skipped] == [
        "line 3:",
        "line 4:",
        "line 5:",
    ]
    assert [source.examples.key(number) for number in range(len(source))] == ["1", "6"]
    with pytest.raises(DataError, match=r"expected a readable file of JSON lines at '.*none\.jsonl'"):
        make(tmp_path / "none.jsonl")


def test_a_name_that_no_image_has_is_refused() -> None:
    make = TASKS["vqa"][1]
    images = {"a": IMAGE}
    for image, message in (
        ("b", "record 0: image: expected a name that images has, got 'b'; add it"),
        (3, "record 0: image: expected its name in images as a text, got 3"),
        (None, "record 0: expected the key 'image'"),
    ):
        with pytest.raises(DataError, match=message):
            make([{"text": "it", "answers": "red", "image": image}], images=images)
    with pytest.raises(DataError, match="record 0: image 'a': expected finite features"):
        make([{"text": "it", "answers": "red", "image": "a"}], images={"a": {**IMAGE, "features": NAN}})
    with pytest.raises(
        DataError, match="record 0: left: expected an image with features and boxes, got 'a'; give images="
    ):
        TASKS["nlvr2"][1]([{"text": "it", "left": "a", "right": "a"}])


def test_unknown_answers_may_be_left_out() -> None:
    records = [{**TASKS["vqa"][0], "answers": {"red": 0.5, "green": 1.0}}]
    source = vqa_source(records, TOKENIZER, answers=ANSWERS, unknown="leave out")
    assert source.batch([0])["targets"].tolist() == [[0.5, 0.0]]


def test_what_is_not_known_is_left_out_of_a_batch_and_of_all_records_or_none() -> None:
    for task, key in (("vqa", "answers"), ("ve", "label"), ("nlvr2", "target")):
        record, make = TASKS[task]
        unknown = changed(record, {key: GONE})
        assert "targets" not in make([unknown] * 2).batch([0, 1])
        with pytest.raises(DataError, match="expected targets of all examples of a batch or of none, got 1 of 2"):
            make([unknown, record]).batch([0, 1])
    question = changed(TASKS["vcr"][0], {"answer": GONE, "rationale": GONE})
    batch = vcr_evaluation_source([question], TOKENIZER, split="test").batch([0])
    assert len(batch["input_ids"]) == 20
    assert "qa_targets" not in batch


def test_options_of_another_kind_are_refused() -> None:
    captions, _ = TASKS["captions"]
    with pytest.raises(ConfigurationError, match="expected one task or more of pre-training, got none"):
        caption_sources([captions], TOKENIZER, tasks=[])
    with pytest.raises(ConfigurationError, match="expected task to be one of mlm, itm"):
        caption_sources([captions], TOKENIZER, tasks=["mlm", "vqa"])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="answers as an AnswerTable"):
        vqa_source([TASKS["vqa"][0]], TOKENIZER, answers=["red"])  # type: ignore[arg-type]
    vqa, make = TASKS["vqa"]
    for images in (3, [IMAGE], "images"):
        with pytest.raises(ConfigurationError, match="expected images as a mapping by name, or a database"):
            make([vqa], images=images)
    with pytest.raises(ConfigurationError, match="expected regions as a function"):
        make([vqa], regions=3)
    with pytest.raises(ConfigurationError, match="expected Regions from the function regions, got 'a'"):
        make([{**vqa, "image": "a"}], regions=lambda picture: picture)
    with pytest.raises(DataError, match="expected two images or more"):
        caption_sources([captions], TOKENIZER)
    assert torch.equal(caption_sources([captions] * 2, TOKENIZER)["itm"].examples.lengths, torch.tensor([6, 6]))
