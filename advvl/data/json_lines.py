"""Files of JSON lines: an object on each line, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

from advvl.checks import path_of, shown
from advvl.data.whereabouts import within
from advvl.errors import DataError
from advvl.files import plain_json

_LONGEST: Final = 64 * 2**20  # bytes of a line


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the object of each line that is not empty.

    Raises:
        DataError: a file that cannot be read; a line that is too long or no JSON object, with its number.
    """
    for number, line in numbered_lines(path):
        with within(f"{path_of(path)}, line {number}"):
            found = as_object(line)
        yield number, found


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line that is not empty.

    Raises:
        DataError: a file that cannot be read; a line that is too long, with its number.
    """
    path = path_of(path)
    try:
        with open(path, "rb") as stream:
            number = 0
            while line := stream.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    raise DataError(f"expected lines of at most {_LONGEST} bytes in {str(path)!r}, got line {number}")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"expected a readable file of JSON lines at {str(path)!r}, got {error}") from error


def as_object(line: bytes) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        found = plain_json(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected JSON, got {error}; correct the line") from error
    if not isinstance(found, dict):
        raise DataError(f"expected a JSON object, got {shown(found)}; correct the line")
    return found
