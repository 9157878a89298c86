"""The page of a run, in Markdown. Standard library alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEADS = ("case", "measure", "value", "goal", "reached", "times", "note")


def page(content: Mapping[str, Any]) -> str:
    parts = ["# GPU check", _facts(content["facts"]), _state(content)]
    for name, section in content["sections"].items():
        parts += [f"## {name}", _section_state(section)]
        tests = [test for test in content["tests"] if test["section"] == name]
        rows = [row for row in content["rows"] if row["section"] == name]
        parts += [_tests(tests), _rows(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def time_text(seconds: float) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * s >= 1), ("ns", 1e9))
    return f"{seconds * scale:.3g} {unit}"


def _facts(facts: Mapping[str, Any]) -> str:
    versions = {name: number for name, number in facts.get("versions", {}).items() if number}
    known = {
        "device": facts.get("device"),
        "driver": facts.get("driver"),
        "CUDA": facts.get("cuda"),
        "commit": facts.get("commit"),
        "taken": facts.get("taken"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return table(("fact", "value"), [(name, str(value)) for name, value in known.items() if value])


def _state(content: Mapping[str, Any]) -> str:
    whole = "All sections have had their turn." if content["finished"] else "**Not finished: what follows is a part.**"
    return whole + (" **Something failed.**" if content["failed"] else "")


def _section_state(section: Mapping[str, Any]) -> str:
    spent = f" after {section['seconds']:.0f} s" if "seconds" in section else ""
    return f"{section['status']}{spent}{': ' + section['note'] if section.get('note') else ''}"


def _tests(tests: Sequence[Mapping[str, Any]]) -> str:
    if not tests:
        return ""
    files: dict[str, Counter[str]] = {}
    for test in tests:
        files.setdefault(test["test"].partition("::")[0], Counter())[test["status"]] += 1
    counted = table(
        ("file", "passed", "failed", "skipped"),
        [(name, *(str(count[status]) for status in ("passed", "failed", "skipped"))) for name, count in files.items()],
    )
    reasons = Counter(test["note"] for test in tests if test["status"] == "skipped")
    failures = [f"* **failed** `{test['test']}`: {test['note']}" for test in tests if test["status"] == "failed"]
    return "\n\n".join([counted, "\n".join([*failures, *(f"* skipped {n}: {why}" for why, n in reasons.items())])])


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    return table(HEADS, [_row(row) for row in rows]) if rows else ""


def _row(row: Mapping[str, Any]) -> Sequence[str]:
    value = row["status"] if row["value"] is None else f"{row['value']:.4g}{row['unit']}"
    if row["interval"]:
        value += " [{:.4g}, {:.4g}]".format(*row["interval"])
    times = [
        f"{name}: {time_text(mid)} [{time_text(low)}, {time_text(high)}]"
        for name, (low, mid, high) in row["seconds"].items()
    ]
    reached = {True: "yes", False: "**no**", None: ""}[row["reached"]]
    return row["case"], row["measure"], value, row["goal"], reached, "<br>".join(times), row["note"]
