"""All that was found, kept on disk as JSON and as a page while it grows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import read, write_atomically
from benchmarks.gpu.page import page


@dataclass
class Record:
    """The state of a run.

    Arguments:
        folder: where `results.json` and `results.md` are written, and the processes' lines and logs.
    """

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    _offset: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines.unlink(missing_ok=True)
        self.write()

    @property
    def lines(self) -> Path:
        return self.folder / "lines.jsonl"

    @property
    def failed(self) -> bool:
        """Whether a test, a check or a whole section failed; a goal that is missed is no failure."""
        return any(entry["status"] == "failed" for entry in [*self.sections.values(), *self.rows, *self.tests])

    def fold(self) -> None:
        """Take in what processes have appended, and write after every line."""
        found, self._offset = read(self.lines, self._offset)
        for line in found:
            kind, content = line["kind"], line["content"]
            if kind == "facts":
                self.facts |= content
            elif kind == "collected":
                section = self.sections[content["section"]]
                section["collected"] = section.get("collected", 0) + content["count"]
            else:
                {"row": self.rows, "test": self.tests}[kind].append(content)
            self.write()

    def mark(self, section: str, **state: Any) -> None:
        """Note the state of a section."""
        self.sections[section] = self.sections.get(section, {}) | state
        self.write()

    def tests_missing(self, section: str) -> int:
        """How many of the tests that were collected have no outcome."""
        had = {test["test"] for test in self.tests if test["section"] == section and "::" in test["test"]}
        return int(self.sections[section].get("collected", 0)) - len(had)

    def mark_spent(self, seconds: float) -> None:
        """Note how long the whole run took."""
        self.facts["seconds"] = round(seconds, 1)
        self.write()

    def content(self) -> Mapping[str, Any]:
        names = ("facts", "finished", "failed", "sections", "rows", "tests")
        return {name: getattr(self, name) for name in names}

    def write(self) -> None:
        content = self.content()
        write_atomically(self.folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write_atomically(self.folder / "results.md", page(content))
