"""The JSON files beside UNITER's databases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advvl.checks import is_whole, shown
from advvl.errors import DataError
from advvl.files import parse_json


def read_json(path: Path, kind: type, holds: str) -> Any:
    """Read a JSON file whose value is of a `kind`, dict or list.

    Raises:
        DataError: it is missing, malformed, or holds another value.
    """
    try:
        found = parse_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"expected {holds} in {str(path)!r}, got {error}; copy the file again") from error
    if not isinstance(found, kind):
        raise DataError(f"expected {holds} in {str(path)!r}, got {shown(found)}; is it another file?")
    return found


def read_counts(path: Path, holds: str) -> dict[str, int]:
    """Read whole numbers of 0 or more by name.

    Raises:
        DataError: as `read_json`; a value that is no such number.
    """
    found: dict[str, int] = read_json(path, dict, holds)
    wrong = next((name for name, count in found.items() if not is_whole(count) or count < 0), None)
    if wrong is not None:
        raise DataError(
            f"{str(path)!r}, {wrong!r}: expected a whole number of 0 or more, got {shown(found[wrong])}; write it again"
        )
    return found


def as_json(value: object) -> bytes:
    """A value as JSON, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
