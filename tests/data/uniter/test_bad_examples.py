"""Examples, shards and tables that no model can use: refused by name, or skipped and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.uniter_databases import arrays
from support.uniter_shards import (
    IMAGES,
    captions,
    pair_records,
    referring_records,
    referring_shard,
    seeded,
    shard,
    vcr_records,
    vcr_shard,
)

from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import ReferringSource
from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs, RetrievalSource
from advvl.data.uniter.datasets.vcr import ChoiceEvaluationSource, ChoiceSource
from advvl.data.uniter.text_db import open_texts
from advvl.errors import ConfigurationError, DataError

NAN = {**IMAGES["i1.npz"], "features": np.full((3, 6), np.nan, "f2")}
EMPTY = {name: values[:0] for name, values in IMAGES["i1.npz"].items()}
WITHOUT = {name: one for name, one in IMAGES.items() if name != "i1.npz"}


def with_one(records: dict[str, Any], key: str, **changed: Any) -> dict[str, Any]:
    return {**records, key: {**records[key], **changed}}


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "image without features": (
        lambda folder, **o: AnswerSource(
            [shard(folder, images={"i0.npz": IMAGES["i0.npz"], "i2.npz": IMAGES["i2.npz"]})], 3, **o
        ),
        r"x\.db, record 't1': expected a record 'i1\.npz' in '.*feat_numbb12', got none",
    ),
    "row without regions": (
        lambda folder, **o: PretrainingSource([shard(folder, images={**IMAGES, "i1.npz": EMPTY})], "mlm", **o),
        r"x\.db, record 't1': expected a region of 'i1\.npz'",
    ),
    "two images of one": (
        lambda folder, **o: AnswerSource([shard(folder, {**captions(), "t1": pair_records()["t1"]})], 3, **o),
        r"x\.db, record 't1': expected one image of an example",
    ),
    "one image of two": (
        lambda folder, **o: PairSource([shard(folder, {**pair_records(), "t1": captions()["t1"]})], **o),
        r"x\.db, record 't1': expected two images of an example",
    ),
    "referring without an image": (
        lambda folder, **o: ReferringSource(
            [referring_shard(folder, {**referring_records(), "1": {"input_ids": [6]}})], names="i{}.npz", **o
        ),
        r"x\.db, record '1': image_id: expected an image's number, got None",
    ),
}

LATE: dict[str, tuple[Callable[..., Any], str]] = {
    "features that are not finite": (
        lambda folder, **o: AnswerSource([shard(folder, images={**IMAGES, "i1.npz": NAN})], 3, **o),
        r"x\.db, record 't1': .*feat_numbb12, record 'i1\.npz': expected finite features",
    ),
    "answers outside the vocabulary": (
        lambda folder, **o: AnswerSource(
            [shard(folder, with_one(captions(), "t1", target={"labels": [3], "scores": [1.0]}))], 3, **o
        ),
        r"x\.db, record 't1': expected labels in 0\.\.2 .* got label 3",
    ),
    "a target that is neither true nor false": (
        lambda folder, **o: PairSource([shard(folder, with_one(pair_records(), "t1", target=2))], **o),
        r"x\.db, record 't1': expected a target of 0 or 1, got 2",
    ),
    "a right answer that is none of four": (
        lambda folder, **o: ChoiceSource([vcr_shard(folder, "qa", with_one(vcr_records(), "q1", qa_target=4))], **o),
        r"x\.db, record 'q1': qa_target: expected the right choice, 0 to 3, got 4",
    ),
    "three answers": (
        lambda folder, **o: ChoiceSource(
            [vcr_shard(folder, "qa", with_one(vcr_records(), "q1", input_ids_as=[[6]] * 3))], **o
        ),
        r"x\.db, record 'q1': input_ids_as: expected ids of four choices",
    ),
    "a box of another image": (
        lambda folder, **o: ReferringSource(
            [referring_shard(folder, with_one(referring_records(), "1", ann_id=99))],
            names="i{}.npz",
            **o,
        ),
        r"x\.db, record '1': ann_id: expected a box of the image, got 99",
    ),
    "a text without words": (
        lambda folder, **o: PretrainingSource([lied_to(folder)], "mlm", **o),
        r"x\.db, record 't1': input_ids: expected ids of one word piece or more, got \[\]",
    ),
}


def lied_to(folder: Path) -> Shard:
    """A database whose JSON file gives a text words that its record lacks."""
    made = shard(folder, with_one(captions(), "t1", input_ids=[]))
    path = folder / "x.db" / "id2len.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "t1": 2}))
    return Shard(open_texts(folder / "x.db"), made.images)


@pytest.mark.parametrize("name", BAD)
def test_an_example_that_cannot_be_used_is_refused_by_name_or_skipped_and_listed(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    with pytest.raises(DataError, match=reason):
        make(tmp_path / "a")
    skipping(make, reason, tmp_path / "b")


@pytest.mark.parametrize("name", LATE)
def test_a_record_that_cannot_be_used_is_refused_when_it_is_read_or_skipped_and_listed(
    name: str, tmp_path: Path
) -> None:
    make, reason = LATE[name]
    source = make(tmp_path / "a")
    with pytest.raises(DataError, match=reason):
        source.batch(range(len(source)), seeded())
    skipping(make, reason, tmp_path / "b")


def skipping(make: Callable[..., Any], reason: str, folder: Path) -> None:
    source = make(folder, skip_bad=True)
    skipped = "\n".join(source.examples.skipped)
    with pytest.raises(DataError, match=reason):
        raise DataError(skipped)
    count = {"q": 3, "t": 14}.get(source.examples.key(0)[0], 9)
    assert len(source) == count - len(source.examples.skipped)
    source.batch(range(len(source)), seeded())


def test_nothing_that_is_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one example or more, got 14 .* the first is .*record 't0'"):
        AnswerSource([shard(tmp_path, images={"z.npz": IMAGES["i0.npz"]})], 3, skip_bad=True)


def test_shards_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one, cased = shard(tmp_path / "a"), shard(tmp_path / "b", bert="other-cased")
    with pytest.raises(DataError, match=r"expected databases of one tokenizer, .*a/x\.db'.*b/x\.db'"):
        AnswerSource([one, cased], 3)
    wide = shard(tmp_path / "c", images={name: arrays(3, features=7) for name in IMAGES})
    with pytest.raises(DataError, match=r"expected 6 features of each region as in '.*a/feat_numbb12', got 7 in '.*c/"):
        AnswerSource([one, wide], 3)
    with pytest.raises(DataError, match=r"expected one Shard\(texts, images\) or more"):
        AnswerSource([], 3)
    with pytest.raises(DataError, match="expected the database of boxes that people drew"):
        ChoiceSource([Shard(vcr_shard(tmp_path / "d", "qa").texts, one.images)])
    with pytest.raises(DataError, match="expected two images or more in each shard"):
        PretrainingSource([shard(tmp_path / "e", {"t0": captions()["t0"]})], "itm")


def test_soft_labels_that_are_missing_are_named(tmp_path: Path) -> None:
    bare = {name: {k: v for k, v in one.items() if k != "soft_labels"} for name, one in IMAGES.items()}
    made = shard(tmp_path, images=bare)
    PretrainingSource([made], "mrfr").batch([0], seeded())
    with pytest.raises(
        DataError, match=r"record 't0': .*record 'i0\.npz': expected soft_labels for 'mrc-kl', got none"
    ):
        PretrainingSource([made], "mrc-kl").batch([0], seeded())


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ([{"id": 0}], r"images\.json, entry 0: expected id, width, height and ann_ids"),
        ([3], r"images\.json, entry 0: expected id"),
        ({}, r"expected the list of images in '.*images\.json'"),
    ],
)
def test_tables_of_referring_expressions_that_are_malformed_are_named(tables: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        ReferringSource([referring_shard(tmp_path, tables=tables)], names="i{}.npz")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda one: PretrainingSource([one], "mlm2"),  # type: ignore[arg-type]
        lambda one: PretrainingSource([one], "mlm", mask=1.5),
        lambda one: AnswerSource([one], 0),
        lambda one: PairSource([one], "pairs"),  # type: ignore[arg-type]
        lambda one: ChoiceEvaluationSource([one], "train"),  # type: ignore[arg-type]
        lambda one: RetrievalSource(Pairs([one]), 0),
        lambda one: HardNegativeSource(Pairs([one]), "image"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(wrong: Callable[[Shard], Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected "):
        wrong(shard(tmp_path))
