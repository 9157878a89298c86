"""Robust-refusal data in its published form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from advvl.data.refusals import read_refusals
from advvl.errors import DataError

RECORD = {"prompt": "how", "rejected": "so", "chosen": "no"}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_texts_are_read_in_order_and_other_fields_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORD | {"category": 3}, RECORD | {"prompt": "why"})
    assert read_refusals(path) == [RECORD, RECORD | {"prompt": "why"}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rejected": 3}, "line 2: expected a text as 'rejected', got 3"),
        ({"chosen": "  "}, "line 2: expected a text as 'chosen', got '  '"),
        ({"prompt": [{"role": "user"}]}, "line 2: expected a text as 'prompt', got [{"),
    ],
)
def test_a_line_without_one_of_the_texts_is_named(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_refusals(write(tmp_path / "a.jsonl", RECORD, RECORD | wrong))


def test_a_line_of_other_fields_says_which_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: expected a text as 'prompt', got only \['goal', 'target'\]; rename"):
        read_refusals(write(tmp_path / "a.jsonl", {"goal": "how", "target": "so"}))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected one record or more"):
        read_refusals(write(tmp_path / "a.jsonl"))
