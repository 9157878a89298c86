"""A plugin of pytest's: appends the outcome of every test, runs one shard of them, and stops when its time is over.

ADVVL_GPU_CHECK holds, as JSON: `section`, `lines` (the file), `shard` and `shards`, and `seconds`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.lines import append

_GIVEN = json.loads(os.environ["ADVVL_GPU_CHECK"])
_END = time.monotonic() + _GIVEN["seconds"]
_OWN = ("advvl", "benchmarks", "support")


def _note(kind: str, **content: Any) -> None:
    append(Path(_GIVEN["lines"]), kind, {"section": _GIVEN["section"], **content})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = items[_GIVEN["shard"] :: _GIVEN["shards"]]
    left = [item for item in items if item not in set(mine)]
    items[:] = mine
    config.hook.pytest_deselected(items=left)
    _note("collected", count=len(mine))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if _GIVEN["shard"] or report.passed:
        return  # every shard collects all
    text = str(report.longrepr)
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else text
        _note("test", test=report.nodeid, status="skipped", seconds=0.0, note=reason.removeprefix("Skipped: "))
        return
    missing = re.search(r"No module named '(\w+)", text)
    absent = missing is not None and missing[1] not in _OWN and importlib.util.find_spec(missing[1]) is None
    reason = f"needs {missing[1]}, which is not installed" if absent and missing else _last(text)
    _note("test", test=report.nodeid, status="skipped" if absent else "failed", seconds=0.0, note=reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    note = ""
    if report.failed:
        note = f"{report.when}: {_last(str(report.longrepr))}"
    elif report.skipped:
        note = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        note = note.removeprefix("Skipped: ")
    _note("test", test=report.nodeid, status=report.outcome, seconds=round(report.duration, 3), note=note)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    if time.monotonic() >= _END:
        item.session.shouldstop = "out of time"


def _last(text: str) -> str:
    """The line of an error that says most."""
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines() or [""]
    return lines[0].removeprefix("E ").strip()[:300]
