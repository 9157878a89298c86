"""What was measured, as the report reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = ("device", "kind", "threads", "versions", "commit")  # facts of a whole run


@dataclass(frozen=True)
class Row:
    """One lane: who did it, how long it took in seconds, and what else is known of it."""

    suite: str
    case: str
    name: str
    median: float
    q1: float
    q3: float
    facts: Mapping[str, Any]

    @property
    def time(self) -> str:
        unit, scale = next(
            ((u, s) for u, s in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if self.median * s >= 1), ("ns", 1e9)
        )
        low, mid, high = (f"{value * scale:.3g}" for value in (self.q1, self.median, self.q3))
        return f"{mid} {unit} [{low}, {high}]"


@dataclass(frozen=True)
class Run:
    """All that was measured on one device."""

    facts: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def device(self) -> str:
        return str(self.facts["device"])

    @property
    def gpu(self) -> bool:
        return bool(self.facts["kind"] == "cuda")

    def cases(self, suite: str) -> dict[str, dict[str, Row]]:
        """The lanes of each case of a suite, in the order of measuring."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if row.suite == suite:
                found.setdefault(row.case, {})[row.name] = row
        return found


def is_copy(name: str) -> bool:
    return name.startswith("copy")


def bare_passes(lanes: Mapping[str, Row]) -> Row | None:
    return next((row for name, row in lanes.items() if name.endswith("bare passes")), None)


def copy_of(lanes: Mapping[str, Row]) -> Row:
    return next(row for name, row in lanes.items() if is_copy(name))


def reduced(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a JSON of pytest-benchmark; nothing that tells one machine from its like."""
    rows, common = [], dict[str, Any]()
    for bench in results["benchmarks"]:
        info = bench["extra_info"]
        common = {key: info[key] for key in COMMON}
        stats = {key: float(f"{bench['stats'][key]:.4g}") for key in ("median", "q1", "q3")}
        facts = {key: value for key, value in info.items() if key not in (*COMMON, "suite", "case", "provider")}
        keys = {"suite": info["suite"], "case": info["case"], "name": info["provider"]}
        rows.append({**keys, **stats, "facts": facts | {"rounds": bench["stats"]["rounds"]}})
    return {"facts": {"taken": results["datetime"][:10], **common}, "rows": rows}


def joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Two runs on one device as one: what was measured again replaces what was, race by race."""
    again = {(row["suite"], row["case"]) for row in after["rows"]}
    rows = [row for row in before["rows"] if (row["suite"], row["case"]) not in again]
    facts = dict(after["facts"])
    for key in ("taken", "commit"):
        facts[key] = ", ".join(dict.fromkeys([*before["facts"][key].split(", "), facts[key]]))
    return {"facts": facts, "rows": [*rows, *after["rows"]]}


def collect(results: Path, data: Path) -> None:
    """Reduce the JSONs of pytest-benchmark in `results` to one of each device in `data`."""
    runs: dict[str, dict[str, Any]] = {}
    for run in sorted((json.loads(path.read_text()) for path in results.glob("*.json")), key=lambda r: r["datetime"]):
        kept = reduced(run)
        name = re.sub(r"[^a-z0-9]+", "-", kept["facts"]["device"].lower()).strip("-")
        runs[name] = joined(runs[name], kept) if name in runs else kept
    for name, run in runs.items():
        data.mkdir(exist_ok=True)
        (data / f"{name}.json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def load(data: Path) -> dict[str, Run]:
    """Every device's run, by the name of its file."""
    runs = {}
    for path in sorted(data.glob("*.json")):
        kept = json.loads(path.read_text())
        runs[path.stem] = Run(kept["facts"], [Row(**row) for row in kept["rows"]])
    return runs
