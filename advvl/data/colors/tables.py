"""The CSV files of the corpus, from a folder or an archive: clicks and messages, recognised by their first line.

A file of clicks has 26 columns under a header that lacks three commas; longer rows have further columns, which are not
read. Rows that cannot be read are listed, with the file, the row and the reason. Files of other kinds are left alone.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from advvl.checks import path_of
from advvl.errors import DataError

CLICKS: Final = 26
"""Columns of a click that are read."""

MESSAGES: Final = 5
"""Columns of a message."""

_FIRST_OF_CLICKS: Final = ("gameid", "time", "roundNum", "condition")
_FIRST_OF_MESSAGES: Final = ("gameid", "time", "roundNum", "sender", "contents")
_LARGEST: Final = 64 * 2**20  # bytes of one file; the largest published one has 7 MB
_MOST_DIGITS: Final = 15
_UNREADABLE: Final = (  # RuntimeError and NotImplementedError of archives that are encrypted, or packed in an unknown way
    *(OSError, EOFError, RuntimeError, NotImplementedError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
)


Color = tuple[float, float, float]


@dataclass(frozen=True)
class Click:
    """One row of clicks: who saw which three colours, and which of them was the target and which was clicked.

    Arguments:
        colors: hue 0..360, saturation and lightness 0..100, of the clicked one and the two others.
        places: 1, 2 or 3 from the left, as the listener saw each.
        target: which of the three the speaker meant.
    """

    game: str
    time: int
    round: int
    condition: str
    colors: tuple[Color, ...]
    places: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Message:
    """One row of messages."""

    game: str
    time: int
    round: int
    sender: str
    contents: str


@dataclass(frozen=True)
class Skipped:
    """A row that was left out."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Tables:
    """All that the files hold, each row once, in the order of their names."""

    clicks: tuple[Click, ...]
    messages: tuple[Message, ...]
    skipped: tuple[Skipped, ...]


def read_tables(path: str | os.PathLike[str]) -> Tables:
    """Read every CSV file of clicks and of messages below a folder, or in a `.zip` or `.tar` archive (packed or not).

    Raises:
        DataError: no such folder or archive, one that is damaged, or none of the files in it.
    """
    clicks: dict[tuple[Any, ...], Click] = {}
    messages: dict[Message, None] = {}
    skipped: list[Skipped] = []
    for name, content in _files(path_of(path)):
        rows = _rows(name, content)
        header = next(rows, [])
        if tuple(header[:4]) == _FIRST_OF_CLICKS:
            read: Any = _click
        elif tuple(header) == _FIRST_OF_MESSAGES:
            read = _message
        else:
            continue
        for number, row in enumerate(rows, start=2):
            if row == header or not row:  # files concatenated from several contain the header of each
                continue
            try:
                found = read(row)
            except ValueError as error:
                skipped.append(Skipped(name, number, str(error)))
                continue
            if isinstance(found, Click):
                clicks.setdefault((found.game, found.time, found.round), found)
            else:
                messages.setdefault(found)
    if not clicks or not messages:
        raise DataError(
            f"expected CSV files of Colors in Context in {str(path)!r}, got {len(clicks)} clicks, {len(messages)} messages; "
            "name its folder or archive"
        )
    return Tables(tuple(clicks.values()), tuple(messages), tuple(skipped))


def _rows(name: str, content: bytes) -> Iterator[list[str]]:
    rows = csv.reader(io.StringIO(content.decode("utf-8", errors="replace"), newline=""))
    try:
        yield from rows
    except csv.Error as error:
        raise DataError(f"expected CSV in {name!r}, got {error} in line {rows.line_num}; correct the line") from error


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Return the CSV files, in the order of their names; archives are read in place, nothing is unpacked."""
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.csv")):
                _check_size(file.stat().st_size, str(file))
                yield str(file.relative_to(path)), file.read_bytes()
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                    if entry.filename.endswith(".csv"):
                        _check_size(entry.file_size, f"{path}: {entry.filename}")
                        yield entry.filename, archive.read(entry)
        else:
            yield from _tarred(path)
    except _UNREADABLE as error:
        raise DataError(
            f"expected a folder or a .zip or .tar archive at {str(path)!r}, got one that cannot be read: {error}"
        ) from error


def _tarred(path: Path) -> Iterator[tuple[str, bytes]]:
    """A compressed archive can only be read in its own order, so its files are held in memory until all are read."""
    held: dict[str, bytes] = {}
    with tarfile.open(path, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".csv"):
                _check_size(member.size, f"{path}: {member.name}")
                stream = archive.extractfile(member)
                held[member.name] = stream.read() if stream else b""
    yield from sorted(held.items())


class _Member(tarfile.TarInfo):
    """A member whose header is read, or refused where tarfile would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark of the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}: it was cut short or damaged") from error


def _check_size(size: int, name: str) -> None:
    if size > _LARGEST:
        raise DataError(f"expected files of at most {_LARGEST} bytes, got {size} in {name}; leave it out")


def _click(row: list[str]) -> Click:
    if len(row) < CLICKS:
        raise ValueError(f"expected {CLICKS} columns, got {len(row)}")
    patches = [row[first : first + 6] for first in (4, 10, 16)]  # status, hue, saturation, lightness, two places
    colors = tuple((_number(patch[1]), _number(patch[2]), _number(patch[3])) for patch in patches)
    for hue, saturation, lightness in colors:
        if not (0 <= hue <= 360 and 0 <= saturation <= 100 and 0 <= lightness <= 100):
            raise ValueError(f"expected hue in 0..360, saturation and lightness in 0..100, got {colors}")
    places = tuple(_whole(patch[5]) for patch in patches)
    if sorted(places) != [1, 2, 3]:
        raise ValueError(f"expected the places 1, 2 and 3, got {places}")
    statuses = [patch[0] for patch in patches]
    if statuses.count("target") != 1:
        raise ValueError(f"expected one target among three colours, got {statuses}")
    return Click(row[0], _whole(row[1]), _whole(row[2]), row[3], colors, places, statuses.index("target"))


def _message(row: list[str]) -> Message:
    """A few rows contain quotes that were not doubled, at which the reader splits them: join them again."""
    if len(row) < MESSAGES:
        raise ValueError(f"expected {MESSAGES} columns, got {len(row)}")
    contents = ",".join(row[4:])
    if "\n" in contents:
        raise ValueError(f"expected contents on one line, got {contents[:40]!r}: a quote is not closed")
    return Message(row[0], _whole(row[1]), _whole(row[2]), row[3], contents)


def _number(text: str) -> float:
    value = float(text)
    if value != value:
        raise ValueError("expected a number, got nan")
    return value


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS or not text.isascii() or not text.isdigit():
        raise ValueError(f"expected a whole number, got {text[:40]!r}")
    return int(text)
