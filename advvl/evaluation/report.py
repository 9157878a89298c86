"""The report of measurements: a directory with the page, and the same as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from advvl.evaluation.comparisons import comparisons
from advvl.evaluation.curves import accuracies, kind_of, radii_of, wins
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.page import Draw, chance_of, check_shown, page
from advvl.evaluation.page_seeds import seed_rows, seed_tables
from advvl.evaluation.page_tables import details, plain, tables, unchecked
from advvl.evaluation.seed_runs import SeedRuns
from advvl.files import write_json, write_text

_COLUMNS = ("model", "perturbation", "radius", "accuracy", "low", "high", "confidence", "examples", "interval")


def to_markdown(
    measurements: Mapping[str, Measurement],
    *,
    title: str = "Robustness",
    confidence: float = 0.95,
    chance: float | None = None,
    runs: Mapping[str, SeedRuns] | None = None,
) -> str:
    """Write the page's flags, checks that were not made and tables as Markdown.

    Raises:
        DataError: measurements or runs that `check_shown` refuses.
    """
    runs = runs or {}
    check_shown(measurements, runs)
    chance = chance_of(measurements, chance)
    flags = [
        f"**{plain(name)}: {plain(flag.name)}.** {plain(flag.detail)}"
        for name, one in measurements.items()
        for flag in one.flags
    ]
    loud = ["## Do not trust these figures yet", *flags] if flags else []
    missing = "\n".join(f"- {plain(name)}: {plain(said)}" for name, said in unchecked(measurements))
    loud += ["Not checked:", missing] if missing else []
    found = list(tables(measurements, confidence=confidence, chance=chance)) if measurements else []
    found += seed_tables(runs, confidence=confidence) if runs else ()
    found += details(measurements) if measurements else ()
    return "\n\n".join([f"# {plain(title)}", *loud, *(table.markdown() for table in found)]) + "\n"


def to_json(
    measurements: Mapping[str, Measurement],
    *,
    confidence: float = 0.95,
    chance: float | None = None,
    runs: Mapping[str, SeedRuns] | None = None,
) -> dict[str, Any]:
    """Return the figures of the page as plain JSON, with intervals in [0, 1].

    Raises:
        DataError: measurements or runs that `check_shown` refuses.
    """
    runs = runs or {}
    check_shown(measurements, runs)
    return {
        "confidence": confidence,
        "chance": chance_of(measurements, chance),
        "models": {
            name: {
                "accuracy": [row for row in _rows(measurements, confidence) if row["model"] == name],
                "wins": [dict(zip(one.attacks, counts.tolist(), strict=True)) for counts in wins(one)],
                "flags": [{"name": flag.name, "detail": flag.detail} for flag in one.flags],
                "about": dict(one.about),
            }
            for name, one in measurements.items()
        },
        "comparisons": [
            {
                "first": one.first,
                "second": one.second,
                "perturbation": one.budget,
                "difference": one.difference.estimate,
                "low": one.difference.low,
                "high": one.difference.high,
                "p_value": one.p_value,
            }
            for one in comparisons(measurements, confidence=confidence)
        ],
        "experiments": {
            name: {
                "label": one.label,
                "chance": one.chance,
                "configuration": dict(one.configuration),
                "versions": None if one.versions is None else dict(one.versions),
                "accuracy": list(seed_rows({name: one}, confidence=confidence)),
            }
            for name, one in runs.items()
        },
    }


def to_csv(
    measurements: Mapping[str, Measurement],
    *,
    confidence: float = 0.95,
    runs: Mapping[str, SeedRuns] | None = None,
) -> str:
    """Write a row for each model and budget, with its accuracy and interval in [0, 1].

    Raises:
        DataError: measurements or runs that `check_shown` refuses.
    """
    runs = runs or {}
    check_shown(measurements, runs)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(measurements, confidence))
    writer.writerows(seed_rows(runs, confidence=confidence))
    return stream.getvalue()


def write_report(
    directory: str | os.PathLike[str],
    measurements: Mapping[str, Measurement],
    *,
    title: str = "Robustness",
    confidence: float = 0.95,
    chance: float | None = None,
    draw: Draw | None = None,
    examples: int = 8,
    runs: Mapping[str, SeedRuns] | None = None,
) -> Path:
    """Write `report.html`, `report.md`, `report.json` and `report.csv`; return the page's path.

    Raises:
        DataError, ConfigurationError: as `page`.
        OutputDirectoryError: the file system refuses to write it.
    """
    said: dict[str, Any] = {"confidence": confidence, "chance": chance, "runs": runs}
    text = page(measurements, title=title, draw=draw, examples=examples, **said)
    folder = Path(directory)
    write_text(folder / "report.md", to_markdown(measurements, title=title, **said))
    write_json(folder / "report.json", to_json(measurements, **said))
    write_text(folder / "report.csv", to_csv(measurements, confidence=confidence, runs=runs))
    return write_text(folder / "report.html", text)


def _rows(measurements: Mapping[str, Measurement], confidence: float) -> Iterator[dict[str, Any]]:
    for name, one in measurements.items():
        budgets = [("clean", "0"), *((kind_of(budget), radii_of(budget)) for budget in one.budgets)]
        for (kind, radii), found in zip(budgets, accuracies(one, confidence=confidence), strict=True):
            values = (name, kind, radii, found.estimate, found.low, found.high, confidence, found.count, found.method)
            yield dict(zip(_COLUMNS, values, strict=True))
