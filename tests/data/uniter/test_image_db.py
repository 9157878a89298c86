"""Databases of images: ours are read by the published reader, its are read by ours, and what is wrong is named."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.uniter_databases import arrays, published_images, read_published_images

from advvl.data.uniter import records
from advvl.data.uniter.image_db import ImageDb, RegionLimits, open_images
from advvl.data.uniter.image_writer import write_images
from advvl.data.uniter.lmdb_files import writing_lmdb
from advvl.data.uniter.records import (
    LARGEST_IMAGE,
    npz_rows,
    pack_arrays,
    pack_npz,
    packed_rows,
    unpack_arrays,
    unpack_npz,
)
from advvl.errors import ConfigurationError, DataError, OutputDirectoryError

TH = "feat_th0.2_max100_min10"
NBB = "nbb_th0.2_max100_min10.json"
IMAGES = {"b.npz": arrays(3, seed=1), "a.npz": arrays(12, seed=2)}
ENDINGS = {False: "", True: "_compressed"}

encodings = pytest.mark.parametrize("compressed", [False, True], ids=["uncompressed", "compressed"])


def write(folder: Path, images: dict[str, Any], limits: RegionLimits | None = None, **options: bool) -> None:
    with write_images(folder, limits, **options) as written:
        for name, one in images.items():
            written.add(name, one["features"], one["norm_bb"], scores=one["conf"], labels=one["soft_labels"])


def same(read: ImageDb, images: dict[str, Any]) -> None:
    for name, one in images.items():
        regions = read.read(name, labels=True)
        assert regions.features.dtype == regions.boxes.dtype == torch.float32
        boxes = torch.from_numpy(one["norm_bb"].astype("f4"))
        assert torch.equal(regions.features, torch.from_numpy(one["features"].astype("f4")))
        assert torch.equal(regions.boxes, torch.cat([boxes, boxes[:, 4:5] * boxes[:, 5:6]], 1))
        assert regions.labels is not None
        assert regions.scores is not None
        assert torch.equal(regions.labels, torch.from_numpy(one["soft_labels"].astype("f4")))
        assert torch.equal(regions.scores, torch.from_numpy(one["conf"][:, 0].astype("f4")))
        assert read.count(name) == len(regions) == len(one["norm_bb"])


@encodings
def test_what_we_write_the_published_reader_reads(compressed: bool, tmp_path: Path) -> None:
    write(tmp_path / "images", IMAGES, compressed=compressed)
    found = read_published_images(tmp_path / "images" / f"{TH}{ENDINGS[compressed]}", compressed=compressed)
    assert found.pop("__keys__") == list(IMAGES)
    assert {name: sorted(one) for name, one in found.items()} == {name: sorted(one) for name, one in IMAGES.items()}
    for name, one in IMAGES.items():
        for kind, values in one.items():
            assert found[name][kind].dtype == np.float16
            assert np.array_equal(found[name][kind], values)
    assert json.loads((tmp_path / "images" / NBB).read_text()) == {"b.npz": 3, "a.npz": 12}


@encodings
def test_what_the_published_writer_wrote_we_read(compressed: bool, tmp_path: Path) -> None:
    folder = published_images(tmp_path, f"{TH}{ENDINGS[compressed]}", IMAGES, compressed=compressed, counts=NBB)
    read = open_images(folder)
    same(read, IMAGES)
    assert read.names == ("b.npz", "a.npz")
    assert len(read) == 2
    assert read.feature_dim == 5
    assert "a.npz" in read
    assert "z.npz" not in read
    assert "__keys__" not in read
    assert read.read("a.npz").labels is None


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_any_images_come_back(counts: list[int], features: int, compressed: bool, half: bool) -> None:
    kind = "f2" if half else "f4"
    images = {f"{n}.npz": arrays(count, features=features, seed=n, dtype=kind) for n, count in enumerate(counts)}
    with tempfile.TemporaryDirectory() as folder:
        limits = RegionLimits(num_bb=20)
        write(Path(folder), images, limits, compressed=compressed, half=half)
        same(open_images(folder, limits, compressed=compressed), images)


def test_the_surest_regions_above_the_threshold_are_kept_between_the_fewest_and_the_most(tmp_path: Path) -> None:
    scores = np.array([0.1, 0.9, 0.2, 0.6, 0.7], dtype="f4")
    one = arrays(5, seed=3, dtype="f4")
    kept = {}
    for most, least in ((9, 1), (2, 1), (9, 4), (9, 9)):
        limits = RegionLimits(max_bb=most, min_bb=least)
        with write_images(tmp_path, limits, half=False) as images:
            count = images.add("x.npz", one["features"], one["norm_bb"][:, :4], scores=scores)
        read = open_images(tmp_path, limits).read("x.npz", labels=True)
        assert len(read) == count
        assert read.labels is None
        assert read.scores is not None
        kept[most, least] = read.scores.tolist()
        order = [int(np.flatnonzero(scores == np.float32(score))[0]) for score in kept[most, least]]
        assert torch.equal(read.features, torch.from_numpy(one["features"][order]))
    surest = [np.float32(score).item() for score in (0.9, 0.7, 0.6, 0.2, 0.1)]
    assert kept == {(9, 1): surest[:3], (2, 1): surest[:2], (9, 4): surest[:4], (9, 9): surest}  # 0.2 is not above 0.2


def test_boxes_that_people_drew_keep_their_order_and_their_number(tmp_path: Path) -> None:
    limits = RegionLimits(num_bb=7)
    drawn = {"x.npz": arrays(4, seed=4, dtype="f4"), "y.npz": arrays(7, seed=5, dtype="f4")}
    drawn["x.npz"]["conf"] = drawn["x.npz"]["conf"][::-1].copy()
    write(tmp_path, drawn, limits, half=False)
    assert [path.name for path in tmp_path.iterdir()] == ["feat_numbb7"]
    read = open_images(tmp_path, limits)
    same(read, drawn)
    assert [read.count(name) for name in read.names] == [4, 7]
    with pytest.raises(DataError, match=r"record 'z': expected at most num_bb = 3 regions, got 4"):
        write(tmp_path, {"z": drawn["x.npz"]}, RegionLimits(num_bb=3))


@encodings
def test_all_regions_are_cut_by_their_scores_where_nobody_counted_them(compressed: bool, tmp_path: Path) -> None:
    images = {"x.npz": arrays(20, seed=6), "y.npz": arrays(20, seed=7)}
    published_images(tmp_path, f"all{ENDINGS[compressed]}", images, compressed=compressed)
    read = open_images(tmp_path, RegionLimits(conf_th=0.5, max_bb=15, min_bb=4))
    for name, one in images.items():
        count = min(15, max(4, int((one["conf"] > 0.5).sum())))
        assert 4 < count < 15
        same(read, {name: {kind: values[:count] for kind, values in one.items()}})
    assert read.names == ("x.npz", "y.npz")


def test_both_encodings_of_the_same_images_share_their_numbers_of_regions(tmp_path: Path) -> None:
    write(tmp_path, IMAGES)
    write(tmp_path, IMAGES, compressed=True)
    assert open_images(tmp_path).compressed is False
    same(open_images(tmp_path, compressed=True), IMAGES)
    other = tmp_path / "other"
    write(other, IMAGES)
    with pytest.raises(OutputDirectoryError, match=rf"expected nothing at '.*{NBB}'"):
        write(other, {"b.npz": arrays(5)}, compressed=True)
    assert sorted(path.name for path in other.iterdir()) == [TH, NBB]


def test_numbers_of_regions_that_a_killed_writer_left_are_written_again(tmp_path: Path) -> None:
    (tmp_path / NBB).write_text('{"z.npz": 3}')
    write(tmp_path, IMAGES)
    same(open_images(tmp_path), IMAGES)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, IMAGES)
    with pytest.raises(OutputDirectoryError, match=rf"expected nothing at '.*{TH}'"):
        write(tmp_path, {"z.npz": arrays(4)})
    same(open_images(tmp_path), IMAGES)
    for wrong in ({}, {"a": arrays(2), "b": {**arrays(2), "features": np.zeros((2, 3))}}):
        with pytest.raises(DataError, match=r"expected one image or more|record 'b': expected 5 features"):
            write(tmp_path / "new", wrong)
    assert list((tmp_path / "new").iterdir()) == []


def test_features_that_half_precision_does_not_hold_are_refused_or_stored_in_single(tmp_path: Path) -> None:
    large = {"x.npz": {**arrays(3, dtype="f4"), "features": np.full((3, 5), 7e4, "f4")}}
    with pytest.raises(DataError, match=r"record 'x\.npz': expected features of at most 65504, got larger ones"):
        write(tmp_path, large, RegionLimits(num_bb=3))
    write(tmp_path, large, RegionLimits(num_bb=3), half=False)
    same(open_images(tmp_path, RegionLimits(num_bb=3)), large)


@encodings
def test_members_without_axes_and_members_that_nobody_asked_for_are_skipped(compressed: bool, tmp_path: Path) -> None:
    strays = {"allow_pickle": np.array(False), "image_h": np.array(480), "more": np.zeros((2, 3), "f4")}
    folder = published_images(
        tmp_path, f"feat_numbb3{ENDINGS[compressed]}", {"x.npz": {**arrays(3), **strays}}, compressed=compressed
    )
    same(open_images(folder, RegionLimits(num_bb=3)), {"x.npz": arrays(3)})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was read",)


@encodings
def test_pickles_are_never_read(compressed: bool, tmp_path: Path) -> None:
    evil = np.array([Evil()], dtype=object)
    if compressed:
        stream = io.BytesIO()
        np.savez_compressed(stream, features=evil, norm_bb=arrays(1)["norm_bb"])
        value = stream.getvalue()
    else:
        assert msgpack_numpy.encode(evil)[b"kind"] == b"O"
        value = msgpack.packb({"features": evil}, default=msgpack_numpy.encode, use_bin_type=True)
    with pytest.raises(DataError, match="features: expected an array of numbers"):
        (unpack_npz if compressed else unpack_arrays)(value, ("features",))


def entry(kind: object = "<f2", shape: object = (2, 3), data: object = bytes(12)) -> bytes:
    one = {b"nd": True, b"type": kind, b"kind": b"", b"shape": shape, b"data": data}
    return bytes(msgpack.packb({"features": one}, use_bin_type=True))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"no msgpack",
        pack_arrays({"features": np.zeros((2, 3), "f2")})[:-3],
        msgpack.packb([1]),
        msgpack.packb({"features": 3}),
        b"\xdd\x7f\xff\xff\xff",
        msgpack.packb({"features": [0] * 5000}),
        entry(kind="|O"),
        entry(kind="<M8[s]"),
        entry(kind=[["a", "<f2"]]),
        entry(kind="<c8"),
        entry(shape=(2, -3)),
        entry(shape=(2, 4)),
        entry(shape=(10**9, 10**9)),
        entry(shape="ab"),
        entry(shape=("a",)),
        entry(shape=(None,)),
        entry(shape=(2.0, 3.0)),
        entry(shape=(2**63, 0), data=b""),
        entry(shape=(True, 6)),
        entry(data=bytes(11)),
        entry(data="text"),
    ],
)
def test_a_msgpack_that_is_no_array_of_numbers_is_refused(value: bytes) -> None:
    with pytest.raises(DataError, match="expected "):
        unpack_arrays(value, ("features",))


def npz(name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def npy(header: str, data: bytes) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


WHOLE = pack_npz({"features": np.zeros((2, 3), "f2")})


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"no zip",
        WHOLE[:-30],
        WHOLE[: len(WHOLE) // 2],
        pack_arrays({"features": np.zeros((2, 3), "f2")}),
        npz("features.npy", bytes(LARGEST_IMAGE + 1)),
        npz("features.npy", b"no npy"),
        npz("features.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000, 1000000000)}", b"")),
        npz("features.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3)}", bytes(11))),
        npz("features.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': (True, 6)}", bytes(12))),
        npz("features.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 6)}", bytes(12))),
        npz("features.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps(Evil))),
        npz("features.npy", npy("{'descr': '<f2', 'fortran_order': False, 'shape': " + "(" * 99 + "}", b"")),
        npz("features.npy", npy("__import__('os')", b"")),
    ],
)
def test_an_npz_that_is_no_array_of_numbers_is_refused(value: bytes) -> None:
    with pytest.raises(DataError, match="expected "):
        unpack_npz(value, ("features",))


def test_arrays_by_columns_and_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    plain = arrays(3, dtype="f4")
    turned = {kind: np.asfortranarray(values.astype(">f4")) for kind, values in plain.items()}
    for compressed in (False, True):
        published_images(tmp_path, f"feat_numbb3{ENDINGS[compressed]}", {"x.npz": turned}, compressed=compressed)
        same(open_images(tmp_path, RegionLimits(num_bb=3), compressed=compressed), {"x.npz": plain})


def broken(**wrong: Any) -> dict[str, Any]:
    return {**arrays(3, dtype="f4"), **wrong}


NAN = arrays(3, dtype="f4")["features"].copy()
NAN[1, 2] = np.nan
BOXES = arrays(3, dtype="f4")["norm_bb"]


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (broken(features=NAN), "expected finite features"),
        (broken(features=NAN + np.inf), "expected finite features"),
        (broken(soft_labels=NAN), "expected finite labels"),
        (broken(features=np.zeros((3, 4), "f4")), "expected 5 features of each region, as in other records, got 4"),
        (broken(features=np.zeros((2, 5), "f4")), "expected 7 numbers of each of 2 boxes"),
        (
            broken(features=np.zeros((0, 5), "f4"), norm_bb=np.zeros((0, 6), "f4")),
            r"expected features \(n, F\) of one region",
        ),
        (broken(features=np.zeros(3, "f4")), r"expected features \(n, F\) of one region"),
        (broken(norm_bb=BOXES[:, :5]), r"expected norm_bb \(n, 6\)"),
        (broken(norm_bb=np.where(np.arange(6) == 1, np.nan, BOXES)), "expected finite boxes"),
        (broken(norm_bb=BOXES * 640), "divide pixels by the image's size"),
        (broken(norm_bb=BOXES - np.float32(0.9)), "divide pixels by the image's size"),
        (broken(norm_bb=BOXES[:, [2, 1, 0, 3, 4, 5]]), "expected boxes x1 <= x2"),
        (broken(soft_labels=np.zeros((2, 4), "f4")), r"expected labels \(3, C\) of 3 regions, got \(2, 4\)"),
        ({"features": np.zeros((3, 5), "f4")}, "got none of norm_bb"),
    ],
)
def test_a_record_that_no_model_can_use_is_named(one: dict[str, Any], reason: str, tmp_path: Path) -> None:
    images = {"a.npz": broken(), "x.npz": one}
    published_images(tmp_path, "feat_numbb3", images, compressed=False)
    read = open_images(tmp_path, RegionLimits(num_bb=3))
    read.read("a.npz")
    with pytest.raises(DataError, match=rf"feat_numbb3, record 'x\.npz': .*{reason}"):
        read.read("x.npz", labels=True)


def test_another_number_of_regions_than_the_json_file_says_is_refused(tmp_path: Path) -> None:
    published_images(tmp_path, TH, IMAGES, compressed=False, counts=NBB)
    (tmp_path / NBB).write_text('{"a.npz": 11, "b.npz": 3}')
    with pytest.raises(DataError, match=rf"record 'a\.npz': expected 11 regions, as {NBB} says, got 12"):
        open_images(tmp_path).read("a.npz")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    published_images(tmp_path, TH, IMAGES, compressed=False, counts=NBB)
    read = open_images(tmp_path)
    for ask in (read.count, read.read):
        with pytest.raises(DataError, match=rf"'z\.npz' in '.*{TH}', got none"):
            ask("z.npz")
    with pytest.raises(DataError, match=rf"expected one of feat_numbb36, feat_numbb36_compressed in .*{TH}"):
        open_images(tmp_path, RegionLimits(num_bb=36))
    with pytest.raises(DataError, match="got none; give the limits"):
        open_images(tmp_path / "nowhere")
    (tmp_path / NBB).unlink()
    with pytest.raises(DataError, match=rf"expected the number of regions of each image in '.*{NBB}'"):
        open_images(tmp_path)
    with writing_lmdb(tmp_path / "feat_numbb1") as file:
        file.put("__keys__", b"[]")
    with pytest.raises(DataError, match=r"expected one image or more in .* is the split empty"):
        open_images(tmp_path, RegionLimits(num_bb=1))


@pytest.mark.parametrize("names", [b"[", b"{}", b"[1]"])
def test_a_list_of_names_that_is_none_is_named(names: bytes, tmp_path: Path) -> None:
    with writing_lmdb(tmp_path / "feat_numbb3") as file:
        file.put("x.npz", pack_arrays(arrays(3)))
        file.put("__keys__", names)
    with pytest.raises(DataError, match="record '__keys__': expected"):
        _ = open_images(tmp_path, RegionLimits(num_bb=3)).names


@pytest.mark.parametrize("wrong", [{"conf_th": 2}, {"max_bb": 0}, {"min_bb": 1.5}, {"num_bb": 0}])
def test_limits_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RegionLimits(**wrong)


@encodings
def test_the_number_of_regions_is_read_from_the_beginning_of_a_record(compressed: bool) -> None:
    one = arrays(9, features=2048)
    value = (pack_npz if compressed else pack_arrays)(one)
    rows = npz_rows if compressed else packed_rows
    assert rows(value) == 9
    if not compressed:
        assert rows(value[:1024]) == 9
        turned = {name: one[name] for name in reversed(one)}
        assert rows(pack_arrays(turned)) == 9
    for wrong in (b"", value[:20], pack_arrays({}), pack_arrays({"features": np.zeros((), "f2")})):
        with pytest.raises(DataError, match="expected "):
            rows(wrong)


def test_our_encoder_gives_the_bytes_of_msgpack_numpy() -> None:
    one = arrays(3)
    assert records.pack_arrays(one) == msgpack.packb(one, default=msgpack_numpy.encode, use_bin_type=True)


def test_a_bomb_is_refused_by_its_size_before_it_is_unpacked() -> None:
    zeros = np.zeros((2, LARGEST_IMAGE // 4), "f2")
    stream = io.BytesIO()
    np.savez_compressed(stream, features=zeros, other=zeros)
    with pytest.raises(DataError, match=f"expected at most {LARGEST_IMAGE} bytes of arrays"):
        unpack_npz(stream.getvalue(), ("features",))
    assert npz_rows(stream.getvalue()) == 2
