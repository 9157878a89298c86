"""Bars with the time left."""

from __future__ import annotations

import io
import sys

import pytest

from advvl.experiments import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "process", "shown"), [(Terminal, 0, True), (Terminal, 1, False), (io.StringIO, 0, False)]
)
def test_a_bar_is_shown_in_a_terminal_by_the_main_process_alone(
    stream: type[io.StringIO], process: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(progress, "process_index", lambda: process)
    assert list(progress.timed([1, 2, 3], "images scored")) == [1, 2, 3]
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("images scored" in said and "3 [" in said) == shown
    assert bool(said) == shown
