"""Robust-refusal data as published: a prompt, an answer to shun and an answer to give on each line."""

from __future__ import annotations

import os
from typing import Final

from advvl.checks import path_of, shown
from advvl.data.json_lines import read_lines
from advvl.data.whereabouts import within
from advvl.errors import DataError

FIELDS: Final = ("prompt", "rejected", "chosen")
"""The fields of LAT's published data, and of TRL's preference data with texts."""


def read_refusals(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Read JSON lines with the texts `prompt`, `rejected` (to shun) and `chosen` (to give); other fields are left out.

        records = read_refusals("harmful.jsonl")

    Raises:
        DataError: a file that cannot be read or has no line; a line that is no JSON object, or lacks one of the texts, with
            its number.
    """
    records = []
    for number, found in read_lines(path):
        with within(f"{str(path_of(path))!r}, line {number}"):
            for field in FIELDS:
                text = found.get(field)
                if not isinstance(text, str) or not text.strip():
                    got = shown(text) if field in found else f"only {sorted(found)}"
                    raise DataError(f"expected a text as {field!r}, got {got}; rename or fill the field")
            records.append({field: found[field] for field in FIELDS})
    if not records:
        raise DataError(f"expected one record or more in {str(path_of(path))!r}, got none")
    return records
