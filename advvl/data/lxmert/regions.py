"""LXMERT's region files, `*_obj36.tsv`: one image per line, read on demand.

The published files are up to 30 GB long. Opening one reads the beginning of each line and skips the features, whose
length follows from the number of regions: a few per cent of the file. `advvl.data.lxmert.lines` has the format.

Legend: n regions, F features.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, NamedTuple

from advvl.checks import is_whole, path_of, shown
from advvl.data.lxmert.lines import (
    HEAD,
    Regions,
    encoded_length,
    format_line,
    parse_head,
    parse_line,
    wrong_number_of_columns,
)
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError
from advvl.files import replacing

NUM_BOXES: Final = 36
_BLOCK: Final = 8192  # bytes: more than a line of 36 regions has before its features
_LONGEST_HEAD: Final = 1 << 24  # bytes: a file without lines is not read into memory whole
_LONGEST_LINE: Final = 1 << 28  # bytes: hundreds of times a line of 36 regions


class LineSpan(NamedTuple):
    """The position of a line: its number from 1, its first byte, its length without the line end, its number of regions."""

    line: int
    offset: int
    length: int
    boxes: int


@dataclass(frozen=True, eq=False)
class RegionFile(Mapping[str, Regions]):
    """The images of one file by their ids, in its order, each read on demand; made by `open_regions`.

    Arguments:
        feature_dim: F.
        num_boxes: the number of regions of every image, or None where it may vary.
    """

    path: Path
    feature_dim: int
    num_boxes: int | None
    places: Mapping[str, LineSpan] = field(repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.places

    def __getitem__(self, image_id: str) -> Regions:
        """Read one image.

        Raises:
            KeyError: the file has no such image.
            DataError: its line is not what the format says, or no longer what it was when the file was opened.
        """
        place = self.places[image_id]
        with _reading(self.path) as stream, within(f"{self.path}, line {place.line}"):
            stream.seek(place.offset)
            image = parse_line(stream.read(place.length), self.feature_dim)
            if (image.image_id, len(image)) != (image_id, place.boxes):
                raise DataError(
                    f"expected {image_id!r} with {place.boxes} regions, as when the file was opened, got {image.image_id!r} "
                    f"with {len(image)}; open it again"
                )
        return image

    @property
    def most_boxes(self) -> int:
        """The largest number of regions of an image."""
        return max(place.boxes for place in self.places.values())


def open_regions(
    path: str | os.PathLike[str], *, num_boxes: int | None = NUM_BOXES, limit: int | None = None
) -> RegionFile:
    """Find the lines of a file, and check them but for the features' values, which are checked when they are read.

    Arguments:
        num_boxes: how many regions every image must have, 36 in what published checkpoints were trained on; None: any.
        limit: only the first so many lines; LXMERT's "minival" has the images of the first 5000 of `val2014_obj36.tsv`.

    Raises:
        DataError: a missing file, one of fewer lines than `limit` or none, a malformed line, an image that occurs twice.
        ConfigurationError: a number below 1.
    """
    for name, value in (("num_boxes", num_boxes), ("limit", limit)):
        if value is not None and (not is_whole(value) or value < 1):
            raise ConfigurationError(f"expected {name} to be a whole number of 1 or more, or None, got {shown(value)}")
    file = path_of(path)
    places: dict[str, LineSpan] = {}
    feature_dim: int | None = None
    with _reading(file) as stream:
        size, offset = stream.seek(0, os.SEEK_END), 0
        while offset < size and len(places) != limit:
            with within(f"{file}, line {len(places) + 1}"):
                columns = _head(stream, offset)
                image_id, count = parse_head(columns)
                if feature_dim is None:
                    feature_dim = parse_line(_line(stream, offset)).features.shape[1]
                if num_boxes not in (None, count):
                    raise DataError(
                        f"column num_boxes: expected {num_boxes}, got {count}; open the file with num_boxes=None if its "
                        "images may have any number"
                    )
                if image_id in places:
                    raise DataError(
                        f"column img_id: expected every image once, got {shown(image_id)}, which line "
                        f"{places[image_id].line} has too; leave one of them out"
                    )
                end = offset + sum(len(column) + 1 for column in columns) + encoded_length(count, feature_dim)
                after = _end_of_line(stream, end, size)
                if after is None:
                    parse_line(_line(stream, offset), feature_dim)  # it says what is wrong
                    raise DataError("expected the line to end after its features, got more; end lines by a line feed")
                places[image_id] = LineSpan(len(places) + 1, offset, end - offset, count)
                offset = after
    if feature_dim is None or (limit is not None and len(places) < limit):
        wanted = "one line or more" if limit is None else f"{limit} lines or more, the limit"
        raise DataError(f"{file}: expected {wanted}, got {len(places)}; is the file whole?")
    return RegionFile(file, feature_dim, num_boxes, places)


def write_regions(path: str | os.PathLike[str], images: Iterable[Regions]) -> None:
    """Write images, one per line, whole or not at all; a generator may give them, for one is held at a time.

    Raises:
        DataError: no image, an image given twice, or images of different numbers of features.
    """
    seen: set[str] = set()
    feature_dim: int | None = None
    with replacing(path) as stream:
        for image in images:
            if image.image_id in seen:
                raise DataError(f"expected every image once in {path}, got {image.image_id!r} twice; leave one out")
            seen.add(image.image_id)
            found = image.features.shape[1]
            feature_dim = feature_dim or found
            if found != feature_dim:
                raise DataError(
                    f"expected {feature_dim} features per region in {path}, as in its first image, got {found} in "
                    f"{image.image_id!r}; write it to another file"
                )
            stream.write(format_line(image))
        if not seen:
            raise DataError(f"expected one image or more to write to {path}, got none")


def _line(stream: IO[bytes], offset: int) -> bytes:
    stream.seek(offset)
    line = stream.readline(_LONGEST_LINE)
    if len(line) == _LONGEST_LINE:
        raise DataError(
            f"expected lines of fewer than {_LONGEST_LINE} bytes, got a longer one; are line feeds missing?"
        )
    return line.rstrip(b"\r\n")


def _head(stream: IO[bytes], offset: int) -> list[bytes]:
    """The columns before the features, of the line at `offset`."""
    stream.seek(offset)
    head = b""
    while head.count(b"\t") < HEAD and b"\n" not in head and len(head) < _LONGEST_HEAD:
        block = stream.read(_BLOCK)
        if not block:
            break
        head += block
    columns = head.partition(b"\n")[0].split(b"\t")
    if len(columns) <= HEAD:
        raise wrong_number_of_columns(len(columns))
    return columns[:HEAD]


def _end_of_line(stream: IO[bytes], end: int, size: int) -> int | None:
    """The first byte of the next line if this one's last byte is before `end`; None if it is not."""
    stream.seek(end)
    after = stream.read(2)
    if after[:1] == b"\n":
        return end + 1
    return end + len(after) if after == b"\r\n" or end == size else None


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb", buffering=_BLOCK) as stream:
            yield stream
    except OSError as error:
        raise DataError(f"expected a readable file of regions at {str(path)!r}, got {error}; check the path") from error
