"""The lines that processes append to one file, and the rows of results among them. Standard library alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["measured", "failed", "skipped", "not run"]


@dataclass(frozen=True)
class Row:
    """One result.

    Arguments:
        case: what it was taken on.
        measure: what the value is, as in "speed of a copy of the same bytes".
        value: a number, with `unit` behind it; None where there is none.
        interval: 95 % of it over rounds drawn with replacement.
        goal: what was asked of it, in words; `reached`: whether it was.
        seconds: of each way that was timed, the lower quartile, the median and the upper quartile.
        note: why there is no value, or what else to know.
    """

    section: str
    case: str
    measure: str
    status: Status = "measured"
    value: float | None = None
    unit: str = ""
    interval: Sequence[float] | None = None
    goal: str = ""
    reached: bool | None = None
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def append(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Add a line in one write, so that several processes may share the file."""
    line = json.dumps({"kind": kind, "content": content}, ensure_ascii=False) + "\n"
    with open(path, "ab", buffering=0) as stream:
        stream.write(line.encode())


def append_row(path: Path, row: Row) -> None:
    append(path, "row", asdict(row))


def read(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines after this offset, and the offset behind them; a line that is being written waits."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as stream:
        stream.seek(offset)
        data = stream.read()
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file as a whole: it holds the old text or the new one at every moment."""
    draft = path.with_name(path.name + ".part")
    with open(draft, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)
