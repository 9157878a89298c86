"""Runs the Python blocks of a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page, each with the number of lines before it."""
    for match in BLOCK.finditer(text):
        yield text[: match.start(1)].count("\n"), match.group(1)


def run(text: str, path: str, names: dict[str, Any]) -> None:
    """Run the blocks in order in one namespace; an error points at its line of the page."""
    for before, code in blocks(text):
        exec(compile("\n" * before + code, path, "exec"), names)
