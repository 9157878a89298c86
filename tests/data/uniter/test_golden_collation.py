"""Batches from databases are those that the published datasets and collations made of the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden_cases import document, tensors
from torch import Tensor

from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.referring import DRAWN, ReferringSource
from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs, RetrievalSource
from advvl.data.uniter.datasets.vcr import ChoiceEvaluationSource, ChoiceSource
from advvl.data.uniter.image_db import ImageDb, RegionLimits, open_images, write_images
from advvl.data.uniter.text_db import TextDb, TextMeta, open_texts, write_texts

GENERATOR = torch.Generator()
LIMITS = RegionLimits(num_bb=100)
Seen = dict[str, tuple[Tensor, Tensor]]


def published(family: str, file: str) -> dict[str, Tensor]:
    """A batch of the published collation, its numbers in single precision, as a database holds them."""
    batch = {name.removeprefix("batch."): value for name, value in tensors(family, file).items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def texts(folder: Path, family: str, keys: Sequence[str] | None = None, lengths: Any = "") -> TextDb:
    """A database of the family's examples, or of some of them."""
    items = document(family, "items")
    meta = TextMeta(items["cls"], items["sep"], items["mask"], (items["first_word"], 97))
    with write_texts(folder, meta) as written:
        for key, record in items["examples"].items():
            if keys is None or key in keys:
                written.add(key, record)
        if "images" in items:
            written.add_table("images", list(items["images"].values()))
    return open_texts(folder, lengths=lengths)


def images(folder: Path, seen: Seen) -> ImageDb:
    with write_images(folder, LIMITS, half=False) as written:
        for name, (features, boxes) in seen.items():
            written.add(name, features, boxes[:, :6])
    return open_images(folder, LIMITS)


def regions(batch: Mapping[str, Tensor], rows: Sequence[tuple[int, Sequence[tuple[str, int]]]]) -> Seen:
    """The regions of images, from the rows of a batch: in each row one image after another, of so many regions."""
    seen: Seen = {}
    for row, names in rows:
        start = 0
        for name, count in names:
            place = slice(start, start + count)
            seen[name] = batch["img_feat"][row, place], batch["img_pos_feat"][row, place]
            start += count
    return seen


def same(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """The same fields, shapes and numbers; areas are multiplied in single precision."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        made = torch.as_tensor(found[name])
        assert made.shape == value.shape, name
        tolerance = 1e-7 if name == "img_pos_feat" else 0
        torch.testing.assert_close(
            made, value.to(made.dtype), rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert made.is_floating_point() == value.is_floating_point()


def test_visual_entailment_collation(tmp_path: Path) -> None:
    family = "villa_ve"
    expected, items = published(family, "batch"), document(family, "items")
    names = [record["img_fname"] for record in items["examples"].values()]
    seen = regions(expected, [(row, [(name, items["regions"][name])]) for row, name in enumerate(names)])
    source = AnswerSource([Shard(texts(tmp_path / "x.db", family), images(tmp_path / "i", seen))], num_answers=3)
    same(source.batch(range(4)), expected)
    assert [source.examples.key(row) for row in range(4)] == list(items["examples"])


@pytest.mark.parametrize("layout", ["paired", "triplet"])
def test_nlvr2_collation(layout: Any, tmp_path: Path) -> None:
    family = "villa_nlvr2"
    items, paired = document(family, "items"), published(family, "batch")
    names = [name for record in items["examples"].values() for name in record["img_fname"]]
    seen = regions(paired, [(row, [(name, items["regions"][name])]) for row, name in enumerate(names)])
    source = PairSource([Shard(texts(tmp_path / "x.db", family), images(tmp_path / "i", seen))], layout)
    same(source.batch(range(3)), paired if layout == "paired" else published(family, "batch_triplet"))


def vcr(folder: Path, keys: Sequence[str], lengths: str) -> Shard:
    family = "villa_vcr"
    items, batch = document(family, "items"), published(family, "batch")
    rows = []
    for row, record in zip((0, 4), items["examples"].values(), strict=True):
        rows.append((row, [(name, items["regions"][name]) for name in record["img_fname"]]))
    seen = regions(batch, rows)
    drawn = images(folder / "gt", {name: one for name, one in seen.items() if name.startswith("gt")})
    found = images(folder / "det", {name: one for name, one in seen.items() if name.startswith("det")})
    return Shard(texts(folder / "x.db", family, keys, lengths), found, drawn)


def test_vcr_collation(tmp_path: Path) -> None:
    train = document("villa_vcr", "items")["train"]
    source = ChoiceSource([vcr(tmp_path / "qa", train["qa"], "qa")], [vcr(tmp_path / "qar", train["qar"], "qar")])
    same(source.batch(range(2)), published("villa_vcr", "batch"))


@pytest.mark.parametrize("split", ["val", "test"])
def test_vcr_evaluation_collation(split: Any, tmp_path: Path) -> None:
    source = ChoiceEvaluationSource([vcr(tmp_path, ["q0", "q1"], "qar")], split)
    same(source.batch(range(2)), published("villa_vcr", f"batch_eval_{split}"))


def retrieval(folder: Path) -> Pairs:
    family = "uniter_itm"
    items = document(family, "items")
    seen: Seen = {}
    for file, pairs in items["pairs"].items():
        flat = [name for group in pairs for _, name in group] if isinstance(pairs, list) else [pairs["image"]]
        if isinstance(pairs, dict) and pairs["side"] == "t":
            flat += pairs["negatives"]
        seen |= regions(published(family, file), [(row, [(n, items["regions"][n])]) for row, n in enumerate(flat)])
    assert set(seen) == set(items["regions"])
    return Pairs([Shard(texts(folder / "x.db", family), images(folder / "i", seen))])


@pytest.mark.parametrize("size", [1, 2])
def test_retrieval_collation(size: int, tmp_path: Path) -> None:
    groups = document("uniter_itm", "items")["pairs"][f"batch_rank_{size}"]
    source = RetrievalSource(retrieval(tmp_path), size)
    found = source.collate([(0, [tuple(pair) for pair in group]) for group in groups])
    same(found, published("uniter_itm", f"batch_rank_{size}"))


@pytest.mark.parametrize("file", ["batch_hard_t0", "batch_hard_t1", "batch_hard_i0", "batch_hard_i1"])
def test_hard_negatives_collation(file: str, tmp_path: Path) -> None:
    pairs = document("uniter_itm", "items")["pairs"][file]
    side = {"t": "images", "i": "texts"}[pairs["side"]]
    expected = published("uniter_itm", file)
    found = {}
    for name, faulty in (("published", True), ("right", False)):
        source = HardNegativeSource(retrieval(tmp_path / name), side, published=faulty)
        found[name] = source.collate(0, (pairs["text"], pairs["image"]), pairs["negatives"])
    same(found["published"], expected)
    right = torch.equal(found["right"]["gather_index"], expected["gather_index"])
    assert right == (file != "batch_hard_i0")  # whose last text is not the longest


def test_referring_expressions_collation(tmp_path: Path) -> None:
    family = "uniter_re"
    items, expected = document(family, "items"), published(family, "batch")
    counts = {number: len(image["ann_ids"]) for number, image in items["images"].items()}
    rows = [
        (row, [(DRAWN.format(record["image_id"]), counts[str(record["image_id"])])])
        for row, record in enumerate(items["examples"].values())
    ]
    shard = Shard(texts(tmp_path / "x.db", family), images(tmp_path / "i", regions(expected, rows)))
    same(ReferringSource([shard]).batch(range(4)), expected)
    boxes = ReferringSource([shard], targets=False, boxes=True).batch(range(4))
    assert "targets" not in boxes
    corners = expected["img_pos_feat"][..., :2] * torch.tensor([640.0, 480.0])
    torch.testing.assert_close(boxes["region_boxes"][..., :2], corners)
    meant = torch.tensor([record["bbox"] for record in items["examples"].values()])
    torch.testing.assert_close(boxes["target_boxes"], meant)
    of_target = boxes["region_boxes"][torch.arange(4), expected["targets"][:, 0]]
    torch.testing.assert_close(of_target, meant, rtol=1e-4, atol=1e-3)


def test_every_field_of_every_batch_is_compared(tmp_path: Path) -> None:
    """The comparison sees a changed number, a missing field and an unknown one."""
    expected = published("villa_ve", "batch")
    for name, value in expected.items():
        changed = value.clone()
        changed.view(-1)[0] += 1
        with pytest.raises(AssertionError):
            same({**expected, name: changed}, expected)
        with pytest.raises(AssertionError):
            same({key: one for key, one in expected.items() if key != name}, expected)
    with pytest.raises(AssertionError):
        same({**expected, "more": torch.zeros(1)}, expected)
