"""JSON lines are read one at a time; what is none is refused with its line, and before it is held in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from advvl.data import json_lines
from advvl.data.json_lines import read_lines
from advvl.errors import DataError


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n  \n{"b": [2]}', encoding="utf-8")
    assert list(read_lines(tmp_path / "x.jsonl")) == [(1, {"a": 1}), (4, {"b": [2]})]


@pytest.mark.parametrize(
    ("line", "said"),
    [("[1]", "a JSON object"), ("{", "JSON"), ('{"a": 1, "a": 2}', "more than once"), ('{"a": ' + "[" * 5000, "JSON")],
    ids=["list", "cut", "twice", "deep"],
)
def test_a_line_that_is_no_object_is_refused_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: .*{said}"):
        list(read_lines(tmp_path / "x.jsonl"))


def test_no_more_of_a_line_is_read_than_the_longest_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 10_000 + b'"}')
    asked: list[Any] = []

    class Watched(io.BytesIO):
        def readline(self, size: Any = -1, /) -> bytes:
            asked.append(size)
            return super().readline(size)

    monkeypatch.setattr(json_lines, "_LONGEST", 100)
    monkeypatch.setattr(json_lines, "open", lambda name, mode: Watched(path.read_bytes()), raising=False)
    with pytest.raises(DataError, match=r"at most 100 bytes .*line 1"):
        list(read_lines(path))
    assert asked == [101]
