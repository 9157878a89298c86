"""Databases of texts: ours are read by the published reader, its are read by ours, and what is wrong is named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.uniter_databases import META, published_texts, read_published_texts

from advvl.data.uniter.lmdb_files import writing_lmdb
from advvl.data.uniter.records import LARGEST_TEXT, pack_text, unpack_text
from advvl.data.uniter.text_db import open_texts
from advvl.data.uniter.text_writer import write_texts
from advvl.data.uniter.word_pieces import TextMeta
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import DataError, OutputDirectoryError

TOKENIZER = TextMeta(1, 2, 3, (6, 97), 5, "tiny-cased")
RECORDS = {
    "b": {"input_ids": [7, 8, 9], "img_fname": "one.npz", "target": {"labels": [1], "scores": [0.3]}},
    "a": {"input_ids": [10], "img_fname": "one.npz", "raw": "ein Wort, größer", "id": 7},
    "c": {"input_ids": [11, 12, 13, 14], "img_fname": ["one.npz", "two.npz"], "target": None},
}

WORDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=40)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.text(min_size=1, max_size=40)


def write(folder: Path, records: dict[str, Any] = RECORDS) -> Path:
    with write_texts(folder, TOKENIZER) as texts:
        for key, record in records.items():
            texts.add(key, record)
    return folder


def test_what_we_write_the_published_reader_reads(tmp_path: Path) -> None:
    records, files = read_published_texts(write(tmp_path / "x.db"))
    assert records == RECORDS
    assert files["id2len"] == {"b": 3, "a": 1, "c": 4}
    assert list(files["id2len"]) == list(RECORDS)  # the order of the data set is that of the file
    assert files["txt2img"] == {"b": "one.npz", "a": "one.npz", "c": ["one.npz", "two.npz"]}
    assert files["img2txts"] == {"one.npz": ["b", "a", "c"], "two.npz": ["c"]}
    assert files["meta"] == {**META, "tokenizer": "tiny-cased", "toker": "tiny-cased"}


def test_what_the_published_writer_wrote_we_read(tmp_path: Path) -> None:
    texts = open_texts(published_texts(tmp_path / "x.db", RECORDS))
    assert {key: texts[key] for key in texts.lengths} == RECORDS
    assert list(texts.lengths.items()) == [("b", 3), ("a", 1), ("c", 4)]
    assert texts.images == {"b": "one.npz", "a": "one.npz", "c": ("one.npz", "two.npz")}
    assert texts.meta == TOKENIZER
    assert "b" in texts
    assert "z" not in texts
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("names", "found"),
    [({}, None), ({"toker": "x"}, "x"), ({"tokenizer": "x"}, "x"), ({"bert": "y", "toker": "x"}, "y")],
    ids=["none", "toker", "tokenizer", "bert"],
)
def test_the_tokenizers_name_is_found_under_any_of_its_keys(
    names: dict[str, str], found: str | None, tmp_path: Path
) -> None:
    meta = {key: value for key, value in META.items() if key not in ("bert", "UNK")}
    read = open_texts(published_texts(tmp_path / "x.db", RECORDS, {**meta, **names})).meta
    assert read == TextMeta(1, 2, 3, (6, 97), None, found)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        NAMES, st.tuples(WORDS, NAMES, st.dictionaries(st.text(), PLAIN, max_size=3)), min_size=1, max_size=5
    )
)
def test_any_records_come_back(drawn: dict[str, tuple[list[int], str, dict[str, Any]]]) -> None:
    records = {key: {**rest, "input_ids": ids, "img_fname": name} for key, (ids, name, rest) in drawn.items()}
    records = {key: {n: v for n, v in record.items() if n != "input_ids_as"} for key, record in records.items()}
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder) / "x.db", records)
        texts = open_texts(written)
        assert {key: texts[key] for key in texts.lengths} == records
        assert list(texts.lengths) == list(records)
        del texts
        assert read_published_texts(written)[0] == records


def test_long_texts_are_left_out_and_listed(tmp_path: Path) -> None:
    texts = open_texts(write(tmp_path / "x.db"), max_length=3)
    assert dict(texts.lengths) == {"b": 3, "a": 1}
    assert texts.left_out == ("c",)
    assert texts.texts == {"one.npz": ("b", "a"), "two.npz": ()}


def test_vcr_has_the_length_of_the_question_and_its_longest_choice(tmp_path: Path) -> None:
    choices = {"input_ids_as": [[6], [6, 7], [6, 7, 8], [6]], "input_ids_rs": [[6] * n for n in (1, 5, 2, 3)]}
    records = {
        "known": {"input_ids": [9, 9], **choices, "qa_target": 1, "qar_target": 0, "img_fname": ["g.npz", "d.npz"]},
        "test": {"input_ids": [9, 9], **choices, "qa_target": -1, "qar_target": -1, "img_fname": ["g.npz", "d.npz"]},
    }
    folder = write(tmp_path / "x.db", records)
    assert open_texts(folder, lengths="qa").lengths == {"known": 2 + 3, "test": 2 + 3}
    assert open_texts(folder, lengths="qar").lengths == {"known": 2 + 2 + 5, "test": 2 + 3 + 5}


def test_referring_expressions_have_tables_and_no_image(tmp_path: Path) -> None:
    with write_texts(tmp_path / "x.db", TOKENIZER) as texts:
        texts.add("1", {"input_ids": [7], "ann_id": 3, "image_id": 4})
        texts.add_table("images", [{"id": 4, "ann_ids": [3], "width": 640, "height": 480}])
        with pytest.raises(DataError, match="expected a table of refs, annotations"):
            texts.add_table("meta", [])
    found = open_texts(tmp_path / "x.db")
    assert found.table("images") == [{"id": 4, "ann_ids": [3], "width": 640, "height": 480}]
    with pytest.raises(DataError, match=r"expected the list of refs in '.*refs\.json'"):
        found.table("refs")
    with pytest.raises(DataError, match=r"expected the image of each example in '.*txt2img\.json'"):
        _ = found.images


def test_a_tokenizer_is_described_by_its_special_tokens_and_its_words() -> None:
    plain = build_tokenizer(["a dog"])
    assert TextMeta.of(plain, "mine") == TextMeta(2, 3, 4, (5, plain.get_vocab_size()), 1, "mine")
    marked = build_tokenizer(["a dog !"])
    assert TextMeta.of(marked, "mine").words[0] == marked.token_to_id("!") > 5


def test_databases_of_different_tokenizers_are_refused_and_of_one_taken() -> None:
    TOKENIZER.check_same(TextMeta(1, 2, 3, (6, 97)), ("a.db", "b.db"))
    others = [TextMeta(9, 2, 3, (6, 97)), TextMeta(1, 2, 3, (6, 98)), TextMeta(1, 2, 3, (6, 97), 5, "tiny-uncased")]
    for other in others:
        with pytest.raises(DataError, match=r"expected databases of one tokenizer, got .*'a\.db'.*'b\.db'"):
            TOKENIZER.check_same(other, ("a.db", "b.db"))


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "x.db")
    with pytest.raises(OutputDirectoryError, match=r"expected nothing at '.*x\.db'"):
        write(folder)
    with pytest.raises(DataError, match="got 'a' twice"), write_texts(tmp_path / "y.db", TOKENIZER) as texts:
        list(map(texts.add, "aba", [{"input_ids": [7]}] * 3))
    with pytest.raises(DataError, match="expected one example or more"), write_texts(tmp_path / "y.db", TOKENIZER):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.db"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "input_ids: expected ids of one word piece or more, got None"),
        ({"input_ids": []}, "expected ids of one word piece or more"),
        ({"input_ids": [1.0]}, "expected ids of one word piece or more"),
        ({"input_ids": [True]}, "expected ids of one word piece or more"),
        ({"input_ids": [-1]}, "expected ids of one word piece or more"),
        ({"input_ids": [7], "img_fname": ""}, "expected img_fname as the name"),
        ({"input_ids": [7], "img_fname": ["a.npz"] * 3}, "expected img_fname as the name"),
        ({"input_ids": [7], "x": object()}, "expected a record of plain values"),
        ({"input_ids": [7], "input_ids_as": [[7]]}, "input_ids_as: expected ids of four choices"),
    ],
)
def test_a_record_that_no_task_can_use_is_refused_by_its_key(
    record: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(DataError, match=rf"x\.db, record 'k': .*{reason}"),
        write_texts(tmp_path / "x.db", TOKENIZER) as texts,
    ):
        texts.add("k", record)


def bad(folder: Path, value: bytes) -> Path:
    """A database whose one record is these bytes."""
    with writing_lmdb(folder) as file:
        file.put("k", value)
    (folder / "meta.json").write_text(json.dumps(META))
    (folder / "id2len.json").write_text('{"k": 1}')
    return folder


BOMB = lz4.frame.compress(bytes(LARGEST_TEXT + 1))
LYING = bytearray(lz4.frame.compress(bytes(1000)))
LYING[6:14] = (10).to_bytes(8, "little")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"no lz4",
        pack_text({"input_ids": [7]})[:-9],
        lz4.frame.compress(b"\xc1"),
        lz4.frame.compress(msgpack.packb([1, 2])),
        lz4.frame.compress(b"\xdd\xff\xff\xff\xff"),
        lz4.frame.compress(b"\x91" * 100_000),
        lz4.frame.compress(msgpack.packb({"a": 1}) + b"\x00"),
        lz4.frame.compress(msgpack.packb("\ud800".encode("utf-8", "surrogatepass").decode("latin1"))),
        BOMB,
        lz4.frame.compress(bytes(LARGEST_TEXT + 1), store_size=False),
        bytes(LYING),
    ],
    ids=[
        "empty",
        "foreign",
        "short",
        "no-code",
        "list",
        "huge-list",
        "deep",
        "more-after",
        "text",
        "bomb",
        "unsized",
        "lies",
    ],
)
def test_a_record_that_does_not_decode_is_named(value: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.db, record 'k': expected "):
        open_texts(bad(tmp_path / "x.db", value))["k"]


@pytest.mark.parametrize("name", ["input_ids", "input_ids_as", "input_ids_rs"])
def test_a_word_that_the_model_does_not_know_is_refused_when_it_is_read(name: str, tmp_path: Path) -> None:
    known = {"input_ids": [7, 96], "input_ids_as": [[6], [96]], "input_ids_rs": [[96], []], "img_fname": "a.npz"}
    bad = {**known, name: [7, 97] if name == "input_ids" else [[6], [97, 8]]}
    folder = published_texts(tmp_path / "x.db", {"good": known, "bad": bad})
    texts = open_texts(folder, vocabulary=97)
    assert texts["good"] == known
    with pytest.raises(
        DataError, match=rf"x\.db, record 'bad': {name}: expected ids below the model's 97 words, got 97"
    ):
        texts["bad"]
    assert open_texts(folder)["bad"] == bad
    assert open_texts(folder, vocabulary=98)["bad"] == bad


def test_a_record_without_its_size_is_read_too() -> None:
    packed = msgpack.packb({"input_ids": [7]}, use_bin_type=True)
    assert unpack_text(lz4.frame.compress(packed, store_size=False)) == {"input_ids": [7]}


def test_files_that_are_missing_or_malformed_are_named(tmp_path: Path) -> None:
    folder = published_texts(tmp_path / "x.db", RECORDS)
    with pytest.raises(DataError, match=r"expected the length of each example in '.*id2len_qa\.json'"):
        open_texts(folder, lengths="qa")
    with pytest.raises(
        DataError, match=r"expected a text of at most 0 word pieces .* got 3 longer ones; is the split empty"
    ):
        open_texts(folder, max_length=0)
    for name, content, reason in (
        ("meta.json", "{}", "expected whole numbers CLS, SEP, MASK"),
        ("meta.json", "[", r"expected the ids of special tokens in '.*meta\.json'"),
        ("id2len.json", '{"a": -1}', "'a': expected a whole number of 0 or more, got -1"),
        ("id2len.json", '{"a": 1, "a": 2}', "'a' more than once"),
        ("id2len.json", "{}", "expected a text of any number of word pieces .* got 0 longer ones"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=reason):
            open_texts(folder)
        (folder / name).write_text(whole)
    texts = open_texts(folder)
    with pytest.raises(DataError, match=r"expected a record 'z' in '.*x\.db', got none"):
        texts["z"]
    (folder / "txt2img.json").write_text('{"a": "one.npz"}')
    with pytest.raises(DataError, match=r"txt2img\.json: expected one image or two of 'b', got None"):
        _ = texts.images


@pytest.mark.parametrize("store_size", [True, False])
def test_a_bomb_is_refused_by_its_size_before_it_is_unpacked(store_size: bool) -> None:
    """Also where it says no size: it is a text of ours but for that."""
    whole = lz4.frame.compress(msgpack.packb({"x": bytes(LARGEST_TEXT)}, use_bin_type=True), store_size=store_size)
    assert len(whole) < LARGEST_TEXT // 100
    with pytest.raises(DataError, match=f"at most {LARGEST_TEXT} bytes"):
        unpack_text(whole)
    fits = {"x": bytes(LARGEST_TEXT - 100)}
    assert unpack_text(lz4.frame.compress(msgpack.packb(fits, use_bin_type=True), store_size=store_size)) == fits
