"""Region files: what is written is what is read, bit for bit and on demand; what is malformed is named."""

from __future__ import annotations

import base64
import csv
import io
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.compare import same
from support.lxmert_files import regions

from advvl.data.lxmert.lines import COLUMNS, Regions, format_line, parse_line
from advvl.data.lxmert.regions import open_regions, write_regions
from advvl.errors import ConfigurationError, DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five images of 36 regions."""
    path = tmp_path / "val2014_obj36.tsv"
    write_regions(path, (regions(f"image-{n}", seed=n) for n in range(5)))
    return path


def lines(path: Path) -> list[list[bytes]]:
    return [line.split(b"\t") for line in path.read_bytes().splitlines()]


def finite(width: int) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False, width=width)  # type: ignore[arg-type]


@st.composite
def images(draw: st.DrawFn) -> Regions:
    count, features = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    height, width = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    ids = arrays.arrays(np.int64, count, elements=st.integers(0, 2**63 - 1))
    scores = arrays.arrays(np.float32, count, elements=finite(32))
    corners = draw(arrays.arrays(np.float32, (count, 2, 2), elements=st.floats(0, 1, width=32)))
    parts = np.sort(corners, axis=1).reshape(count, 4)
    return Regions(
        image_id=draw(st.text(st.characters(exclude_categories=("Cs",), exclude_characters='\t\r\n"'), min_size=1)),
        height=height,
        width=width,
        object_ids=torch.from_numpy(draw(ids)),
        object_scores=torch.from_numpy(draw(scores)),
        attribute_ids=torch.from_numpy(draw(ids)),
        attribute_scores=torch.from_numpy(draw(scores)),
        boxes=torch.from_numpy(parts * np.array([width, height, width, height], np.float32)),
        features=torch.from_numpy(draw(arrays.arrays(np.float32, (count, features), elements=finite(32)))),
    )


@pytest.mark.slow
@given(image=images())
@settings(max_examples=60, deadline=None)
def test_an_image_is_the_same_bits_after_its_line(image: Regions) -> None:
    line = format_line(image)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert line.count(b"\t") == len(COLUMNS) - 1
    same(parse_line(line.removesuffix(b"\n")), image)


def test_a_line_is_what_the_published_reader_expects() -> None:
    """Written out by hand: columns in order, little-endian, boxes in pixels."""
    image = Regions(
        image_id="COCO_val2014_000000000042",
        height=240,
        width=320,
        object_ids=torch.tensor([7, 1599]),
        object_scores=torch.tensor([0.5, 0.25]),
        attribute_ids=torch.tensor([3, 0]),
        attribute_scores=torch.tensor([1.0, 0.125]),
        boxes=torch.tensor([[0.0, 0.0, 320.0, 240.0], [20.0, 30.0, 80.0, 60.0]]),
        features=torch.tensor([[1.5, -2.0, 3.0], [0.0, 4.0, 5.0]]),
    )
    packed = [
        struct.pack("<qq", 7, 1599),
        struct.pack("<ff", 0.5, 0.25),
        struct.pack("<qq", 3, 0),
        struct.pack("<ff", 1.0, 0.125),
        struct.pack("<8f", 0, 0, 320, 240, 20, 30, 80, 60),
        struct.pack("<6f", 1.5, -2, 3, 0, 4, 5),
    ]
    encoded = [base64.b64encode(data).decode() for data in packed]
    expected = ["COCO_val2014_000000000042", "240", "320", *encoded[:4], "2", *encoded[4:]]
    assert format_line(image).decode() == "\t".join(expected) + "\n"
    assert image.positions().tolist() == [[0, 0, 1, 1], [0.0625, 0.125, 0.25, 0.25]]


def test_images_are_found_by_their_ids_whatever_the_order(path: Path) -> None:
    file = open_regions(path)
    assert list(file) == [f"image-{n}" for n in range(5)]
    assert (file.feature_dim, file.num_boxes, file.most_boxes, len(file)) == (5, 36, 36, 5)
    for n in (4, 0, 3, 0):
        same(file[f"image-{n}"], regions(f"image-{n}", seed=n))
    assert "image-5" not in file
    with pytest.raises(KeyError):
        file["image-5"]


def test_a_limit_takes_the_first_lines_and_looks_at_no_other(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-49])  # the last line is cut short
    assert list(open_regions(path, limit=2)) == ["image-0", "image-1"]
    with pytest.raises(DataError, match=r"line 5: column features: expected 720 bytes"):
        open_regions(path)


class CountingFile(io.FileIO):
    """A file that knows how many bytes were read of it."""

    total = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = super().readinto(buffer)
        CountingFile.total += count
        return count

    def readall(self) -> bytes:
        data = super().readall()
        CountingFile.total += len(data)
        return data


def test_opening_reads_a_fraction_of_a_file_of_the_published_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a line longer than the csv module's limit on fields is no trouble."""
    path = tmp_path / "train2014_obj36.tsv"
    write_regions(path, (regions(str(n), feature_dim=2048, seed=n) for n in range(12)))
    assert len(lines(path)[0][-1]) > csv.field_size_limit()

    def counted(path: Path, mode: str, buffering: int) -> io.BufferedReader:
        return io.BufferedReader(CountingFile(path), buffering)

    monkeypatch.setattr(CountingFile, "total", 0)
    monkeypatch.setattr("advvl.data.lxmert.regions.open", counted, raising=False)
    file = open_regions(path)
    of_a_line = path.stat().st_size / 12
    assert of_a_line < CountingFile.total < 2 * of_a_line  # the first line whole, and a little of each other
    same(file["7"], regions("7", feature_dim=2048, seed=7))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_either_line_end_will_do_and_the_last_may_be_missing(path: Path, line_end: bytes, at_the_end: bool) -> None:
    joined = line_end.join(b"\t".join(columns) for columns in lines(path))
    path.write_bytes(joined + line_end * at_the_end)
    file = open_regions(path)
    assert len(file) == 5
    for n in range(5):
        same(file[f"image-{n}"], regions(f"image-{n}", seed=n))


def test_images_of_other_numbers_of_regions_are_read_where_that_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "some.tsv"
    made = [regions(str(count), count, seed=count) for count in (3, 1, 6)]
    write_regions(path, made)
    file = open_regions(path, num_boxes=None)
    assert (file.num_boxes, file.most_boxes) == (None, 6)
    for image in made:
        same(file[image.image_id], image)
    with pytest.raises(DataError, match=r"some.tsv, line 1: column num_boxes: expected 36, got 3; .*num_boxes=None"):
        open_regions(path)
    with pytest.raises(DataError, match=r"line 2: column num_boxes: expected 3, got 1"):
        open_regions(path, num_boxes=3)


def packed(dtype: str, *numbers: float) -> bytes:
    return base64.b64encode(np.array(numbers, dtype).tobytes())


def change(column: str, value: bytes) -> Callable[[list[bytes]], list[bytes]]:
    at = COLUMNS.index(column)
    return lambda columns: [*columns[:at], value, *columns[at + 1 :]]


BOXES = (0.0, 0.0, 640.0, 480.0) * 35
MALFORMED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a column too few": (lambda columns: columns[:-1], "expected 10 tab-separated columns, img_id, .*, got 9"),
    "a column too many": (lambda columns: [*columns, b"x"], "expected 10 tab-separated columns, .*, got 11"),
    "an empty line": (lambda columns: [b""], "expected 10 tab-separated columns, .*, got 1"),
    "an image without an id": (change("img_id", b""), "column img_id: expected a text"),
    "an id that is not UTF-8": (change("img_id", b"\xff\xfe"), "column img_id: expected UTF-8"),
    "an id in quotes": (change("img_id", b'"image"'), "column img_id: expected a text without"),
    "no height": (change("img_h", b"0"), "column img_h: expected a number of pixels of 1 or more, got 0"),
    "a width in letters": (
        change("img_w", b"wide"),
        "column img_w: expected a whole number of at most 9 digits, got b'wide'",
    ),
    "a number with a sign": (change("num_boxes", b"-36"), "column num_boxes: expected a whole number .*got b'-36'"),
    "more regions than memory": (
        change("num_boxes", b"999999999"),
        "column objects_id: expected 7999999992 bytes.*got 288",
    ),
    "a number beyond all": (change("num_boxes", b"9" * 30), "column num_boxes: .* of at most 9 digits, got b'9{30}'"),
    "a number of thousands of digits": (change("num_boxes", b"9" * 5000), "column num_boxes: .*got b'9{40}'"),
    "a height of hundreds of digits": (change("img_h", b"9" * 400), "column img_h: .*got b'9{40}'"),
    "an id as long as a book": (change("img_id", b'"' * 10**6), "column img_id: .*\\.\\.\\."),
    "no regions": (change("num_boxes", b"0"), "column num_boxes: expected 1 or more, got 0"),
    "another number of regions": (change("num_boxes", b"35"), "column objects_id: expected 280 bytes.*got 288"),
    "ids that are not base64": (change("objects_id", b"#" * 384), "column objects_id: expected base64, got 384 char"),
    "scores in double precision": (
        change("attrs_conf", packed("<f8", *[0.5] * 36)),
        "column attrs_conf: expected 144 bytes.*got 288",
    ),
    "boxes for fewer regions": (change("boxes", packed("<f4", *BOXES)), "column boxes: expected 576 bytes.*got 560"),
    "a box to the right of the image": (
        change("boxes", packed("<f4", *BOXES, 600, 0, 640.1, 480)),
        r"column boxes: expected .* within 640 x 480 .*, got \[600.0, 0.0, 640.09.*, 480.0\] in region 35",
    ),
    "a box above the image": (change("boxes", packed("<f4", *BOXES, 0, -1, 640, 480)), "column boxes: .* region 35"),
    "a box that is not a number": (
        change("boxes", packed("<f4", *BOXES, 0, 0, np.nan, 480)),
        "column boxes: expected finite numbers",
    ),
    "a box whose corners are reversed": (
        change("boxes", packed("<f4", *BOXES, 600, 0, 40, 480)),
        r"column boxes: expected x1 <= x2 and y1 <= y2, got \[600.0, 0.0, 40.0, 480.0\] in region 35; give corners",
    ),
    "a negative class": (
        change("attrs_id", packed("<i8", *[0] * 35, -1)),
        "column attrs_id: expected classes from 0, got -1; leave the background class out",
    ),
    "a score that is infinite": (
        change("objects_conf", packed("<f4", *[0.5] * 35, np.inf)),
        "column objects_conf: expected finite numbers",
    ),
    "features of another width": (
        change("features", packed("<f4", *[0.0] * 36 * 4)),
        "column features: expected 720 bytes, 36 regions times 5 numbers <f4, got 576",
    ),
    "an image that was there before": (
        change("img_id", b"image-1"),
        "column img_id: expected every image once, got 'image-1', which line 2 has too",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_when_the_file_is_opened(path: Path, case: str) -> None:
    spoil, message = MALFORMED[case]
    found = lines(path)
    found[3] = spoil(found[3])
    path.write_bytes(b"".join(b"\t".join(columns) + b"\n" for columns in found))
    with pytest.raises(DataError, match=re.escape(f"{path}, line 4: ") + message):
        open_regions(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda field: b"#" + field[1:], "column features: expected base64"),
        (lambda field: field[:200] + b"\n" + field[201:], "column features: expected base64"),
        (lambda field: packed("<f4", *[0.0] * 179, np.nan), "column features: expected finite numbers"),
    ],
    ids=["not base64", "a line end within", "not a number"],
)
def test_malformed_features_are_named_when_they_are_read(
    path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    found = lines(path)
    found[3][-1] = spoil(found[3][-1])
    path.write_bytes(b"".join(b"\t".join(columns) + b"\n" for columns in found))
    file = open_regions(path)
    same(file["image-2"], regions("image-2", seed=2))
    with pytest.raises(DataError, match=re.escape(f"{path}, line 4: ") + message):
        file["image-3"]


@pytest.mark.parametrize(
    "kept", [0.05, 0.5, 0.9, -1], ids=["in the id", "in the middle", "at the end", "by a character"]
)
def test_a_file_that_is_cut_short_is_refused(path: Path, kept: float) -> None:
    first = path.read_bytes().index(b"\n")
    whole = path.read_bytes()
    cut = first + int(kept * first) if kept > 0 else first + first - 1
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"line 2.*(columns|column features).*cut short"):
        open_regions(path)


def test_boxes_may_reach_beyond_the_image_by_rounding_and_no_more() -> None:
    image = regions("a", 1)
    for beyond, good in ((0.5e-5, True), (2e-5, False)):
        for box in ([-beyond * 640, 0.0, 1.0, 1.0], [0.0, 0.0, 640 * (1 + beyond), 480.0]):
            if good:
                replace(image, boxes=torch.tensor([box]))
            else:
                with pytest.raises(DataError, match="column boxes"):
                    replace(image, boxes=torch.tensor([box]))


def test_an_image_that_changes_under_a_reader_is_seen(path: Path) -> None:
    file = open_regions(path)
    found = lines(path)
    found[1], found[2] = found[2], found[1]
    path.write_bytes(b"".join(b"\t".join(columns) + b"\n" for columns in found))
    with pytest.raises(DataError, match=r"line 2: expected 'image-1' .* got 'image-2'.*open it again"):
        file["image-1"]


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_file_that_is_missing_or_empty_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tsv"):
        open_regions(path)


def test_a_limit_beyond_the_file_is_refused(path: Path) -> None:
    assert len(open_regions(path, limit=5)) == 5
    with pytest.raises(DataError, match="expected 5000 lines or more, the limit, got 5"):
        open_regions(path, limit=5000)


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"num_boxes": 0}], ids=["limit", "num_boxes"])
def test_numbers_below_one_are_refused(path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="of 1 or more"):
        open_regions(path, **arguments)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "one image or more"),
        ([regions("a"), regions("a")], "'a' twice"),
        ([regions("a"), regions("b", feature_dim=6)], "expected 5 features .* got 6 in 'b'"),
    ],
    ids=["none", "twice", "widths"],
)
def test_what_cannot_be_read_back_is_not_written(path: Path, made: list[Regions], message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        write_regions(path, made)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_images_are_drawn_one_by_one_and_the_file_is_there_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"

    def endless() -> object:
        for n in range(10):
            assert not path.exists()
            yield regions(str(n), 2)

    write_regions(path, islice(endless(), 4))  # type: ignore[call-overload]
    assert len(open_regions(path, num_boxes=2)) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": torch.zeros(2, 5)},
        {"features": torch.zeros(3, 5)},
        {"features": torch.zeros(2, 5, dtype=torch.float64)},
        {"features": torch.zeros(2, 0)},
        {"object_ids": torch.zeros(2)},
        {"attribute_scores": torch.zeros(2, 1)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_regions_of_another_shape_or_type_are_refused(changes: dict[str, torch.Tensor]) -> None:
    with pytest.raises(DataError, match=r"column .*: expected"):
        replace(regions("a", 2), **changes)


def test_regions_are_counted_before_anything_is_made_for_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = change("num_boxes", b"999999999")(lines(path)[0])
    path.write_bytes(b"\t".join(found) + b"\n")
    monkeypatch.setattr(torch, "zeros", lambda *_: pytest.fail("made for the regions that a file claims"))
    with pytest.raises(DataError, match="objects_id"):
        open_regions(path, num_boxes=None)


def test_a_line_without_an_end_is_not_read_into_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advvl.data.lxmert.regions._LONGEST_LINE", 1000)
    with pytest.raises(DataError, match="line 1: expected lines of fewer than 1000 bytes, got a longer one"):
        open_regions(path)


@pytest.mark.parametrize("wrong", [{"num_boxes": 0}, {"num_boxes": "36"}, {"limit": 1.5}, {"limit": True}], ids=str)
def test_numbers_that_are_none_are_refused(path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {next(iter(wrong))} to be a whole number of 1 or more"):
        open_regions(path, **wrong)
