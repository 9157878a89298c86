"""The part of a report that is about experiments over seeds: curves, a table of accuracies and one of differences."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from advvl.evaluation.comparisons import holm
from advvl.evaluation.page_svg import curve_svg, legend
from advvl.evaluation.page_tables import Table, flat, shown_p_value
from advvl.evaluation.seed_runs import CLEAN, SeedCurve, SeedRuns
from advvl.evaluation.statistics import Interval


def seed_curves(runs: Mapping[str, SeedRuns], *, confidence: float = 0.95) -> str:
    """Draw the curves of all methods of experiments, in HTML.

    Arguments:
        runs: by the experiments' names, as `check_same_test` lets them pass.
        confidence: of the bands.
    """
    first = next(iter(runs.values()))
    drawn = "".join(
        f"<div><h3>{html.escape(kind)}</h3>{curve_svg(_named(runs, kind), confidence=confidence, chance=first.chance)}</div>"
        for kind in first.curves
        if kind != CLEAN
    )
    note = (
        f"Lines: worst-case accuracy, mean over seeds; bands: {_interval(runs, confidence)}. {_labels(runs)} These are "
        "attacks of the experiments' own, with no verification and no flags: they are not compared with other figures of "
        "this page."
    )
    return (
        f"<section><h2>Experiments: accuracy against radius</h2><p>{html.escape(note)}</p>"
        f'{legend(list(_named(runs, next(iter(first.curves)))))}<div class="curves">{drawn}</div></section>'
    )


def seed_tables(runs: Mapping[str, SeedRuns], *, confidence: float = 0.95) -> Iterator[Table]:
    """Yield the tables of accuracies, of differences to each baseline, and of configurations."""
    first = next(iter(runs.values()))
    rows: list[tuple[str, ...]] = []
    for kind in first.curves:
        curves = _named(runs, kind)
        columns = [[found.percent() for found in curve.intervals(confidence=confidence)] for curve in curves.values()]
        rows += zip(_conditions(next(iter(curves.values()))), *columns, strict=True)
    yield Table(
        "Experiments: accuracy under attack",
        ("perturbation", *_named(runs, next(iter(first.curves)))),
        tuple(rows),
        f"Per cent [{_interval(runs, confidence)}]; at radius 0 the clean accuracy of the examples that were attacked.",
    )
    for name, one in runs.items():
        found, count = _differences(one, confidence)
        if found:
            yield Table(
                f"Experiments: difference to {_name(runs, name, one.baseline)}",
                ("perturbation", *(method for method in next(iter(one.curves.values())) if method != one.baseline)),
                tuple(found),
                f"In points [{100 * confidence:g} % t-interval], paired by seed; p of the paired t-test, by Holm's "
                f"correction for all {count} of this table (none where all seeds differ by the same); - where fewer than "
                "two seeds are common.",
            )
    for name, one in runs.items():
        how = {**one.configuration, "versions": one.versions or "not known"}
        yield Table(f"How {name} was run", ("what", "value"), tuple(flat(how)), long=True)


def seed_rows(runs: Mapping[str, SeedRuns], *, confidence: float = 0.95) -> Iterator[dict[str, Any]]:
    """Yield a row for each method, modality and radius, with its accuracy and interval in [0, 1]."""
    for name, one in runs.items():
        for kind, methods in one.curves.items():
            for method, curve in methods.items():
                for radius, found in zip((0.0, *curve.radii), curve.intervals(confidence=confidence), strict=True):
                    yield {
                        "model": _name(runs, name, method),
                        "perturbation": kind,
                        "radius": f"{radius:g}",
                        "accuracy": found.estimate,
                        "low": found.low,
                        "high": found.high,
                        "confidence": confidence,
                        "examples": curve.examples,
                        "interval": f"{found.method} over {found.count} seeds"
                        if len(curve.accuracies) > 1
                        else found.method,
                    }


def _differences(one: SeedRuns, confidence: float) -> tuple[list[tuple[str, ...]], int]:
    """The rows of differences to the baseline with their p-values, and the number of tests that these are corrected for."""
    rows: list[tuple[str, list[tuple[Interval, float | None] | None]]] = []
    for methods in one.curves.values():
        base = methods[one.baseline]
        columns = [_tested(curve, base, confidence) for method, curve in methods.items() if method != one.baseline]
        if any(columns):
            for i, condition in enumerate(_conditions(base)):
                rows.append((condition, [None if column is None else column[i] for column in columns]))
    known = [cell[1] for _, cells in rows for cell in cells if cell is not None and cell[1] is not None]
    adjusted = iter(holm(known))

    def shown(cell: tuple[Interval, float | None] | None) -> str:
        if cell is None:
            return "-"
        difference, p_value = cell
        return difference.percent(signed=True) + shown_p_value(None if p_value is None else next(adjusted))

    return [(condition, *map(shown, cells)) for condition, cells in rows], len(known)


def _tested(curve: SeedCurve, base: SeedCurve, confidence: float) -> list[tuple[Interval, float | None]] | None:
    """The differences of a method to the baseline with their p-values; None without two seeds in common."""
    less, p_values = curve.less(base, confidence=confidence), curve.p_values(base)
    return None if less is None or p_values is None else list(zip(less, p_values, strict=True))


def _conditions(curve: SeedCurve) -> list[str]:
    if curve.kind == CLEAN:
        return [f"clean, {curve.examples} examples"]
    return [f"{curve.kind} {mark}" for mark in ("0", *curve.marks)]


def _named(runs: Mapping[str, SeedRuns], kind: str) -> dict[str, SeedCurve]:
    """The curves of all experiments by the names of their methods."""
    return {
        _name(runs, name, method): curve for name, one in runs.items() for method, curve in one.curves[kind].items()
    }


def _name(runs: Mapping[str, SeedRuns], name: str, method: str) -> str:
    return method if len(runs) == 1 else f"{name}: {method}"


def _interval(runs: Mapping[str, SeedRuns], confidence: float) -> str:
    """The kind of the intervals, in words."""
    counts = {len(curve.accuracies) for one in runs.values() for of in one.curves.values() for curve in of.values()}
    kinds = [*(["t-interval over seeds"] if max(counts) > 1 else [])]
    kinds += ["Wilson interval over examples where there is one seed"] if 1 in counts else []
    return f"{100 * confidence:g} % {', '.join(kinds)}"


def _labels(runs: Mapping[str, SeedRuns]) -> str:
    return " ".join(f"{name}: {one.label}." for name, one in runs.items())
