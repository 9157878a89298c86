"""The report of a summary: tables with intervals, a curve, and the numbers behind them as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from advvl.errors import DataError
from advvl.evaluation.comparisons import holm
from advvl.evaluation.figures import draw_line, new_figure
from advvl.evaluation.statistics import Interval
from advvl.evaluation.summary import Condition, MethodSummary, RunResult, Summary

_COLUMNS: Final = 100  # of a terminal


def markdown(summary: Summary, *, caption: str = "") -> str:
    """Return the report as aligned Markdown tables of at most 100 columns, and its headline; accuracies in per cent.

    Arguments:
        caption: how the numbers came about, above the tables.
    """
    shown = _shown(summary)
    percent = f"{100 * summary.confidence:g} %"
    heads = [_head(condition, summary) for condition in shown]
    accuracies = [
        [row.method, *(_cell(row.accuracy[c], 100) for c in shown), _cell(row.seconds_per_update, 1e3)]
        for row in summary.rows
    ]
    parts = [
        *([caption] if caption else []),
        f"Accuracy in per cent [{percent} interval]; {_over(summary)}.",
        *_tables(["method", *heads, "ms per update"], accuracies),
    ]
    others = [row for row in summary.rows if row.method != summary.baseline]
    if others:
        paired = "example, Agresti-Min interval" if summary.over == "examples" else "seed, t-interval"
        cells, level, corrected = len(others) * len(shown), 1 - summary.confidence, _corrected(summary, shown)
        chance = f"by chance alone one cell in {1 / level:.0f} would have a star"
        notes = [
            f"Difference to {summary.baseline} in points [{percent} interval], paired by {paired}; * where it excludes 0.",
            f"Not corrected for the number of cells ({cells}): {chance}.",
        ]
        if summary.over == "seeds":
            notes.append(
                f"** where p < {level:.2g} by the paired t-test and Holm's correction for all {len(corrected)}."
            )

        def starred(row: MethodSummary, condition: Condition) -> str:
            cell = _cell(row.difference[condition], 100, signed=True)
            return f"{cell}*" if corrected.get((row.method, condition), 1.0) < level else cell

        parts += [
            "\n".join(notes),
            *_tables(["method", *heads], [[row.method, *(starred(row, c) for c in shown)] for row in others]),
            headline(summary),
        ]
    if any(row.difference[c].low == row.difference[c].high for row in others for c in shown):
        parts.append("An interval without width says that every seed came to the same difference, not that it is sure.")
    parts.append(
        "Robust accuracy counts an example by the worst score that any attack reached;\na stronger attack can only lower it."
    )
    return "\n\n".join(parts) + "\n"


def _corrected(summary: Summary, shown: Sequence[Condition]) -> dict[tuple[str, Condition], float]:
    """The p-values by method and condition, by Holm's correction for all that are shown and have one."""
    found = {(row.method, c): p for row in summary.rows for c in shown if (p := row.p_value.get(c)) is not None}
    return dict(zip(found, holm(list(found.values())), strict=True))


def headline(summary: Summary) -> str:
    """Return the comparison of the first VILLA, or else the first other method, with the baseline, in one sentence."""
    others = [row for row in summary.rows if row.method != summary.baseline]
    row = next((row for row in others if row.method.startswith("VILLA")), others[0])
    base = next(row for row in summary.rows if row.method == summary.baseline)

    def compared(condition: Condition) -> str:
        difference = row.difference[condition]
        sure = "" if math.isnan(difference.low) or difference.excludes_zero() else ", which may be none"
        scores = (100 * one.accuracy[condition].estimate for one in (row, base))
        return (
            "{:.1f} % against {:.1f} %, ".format(*scores)
            + f"{_cell(difference, 100, signed=True).rstrip('*')} points{sure}"
        )

    attacked = [condition for condition in summary.conditions if condition.radius > 0]
    said = f"{row.method} against {summary.baseline}: {compared(Condition())}"
    if attacked:
        said += f";\nunder attack ({attacked[0].modality}, radius {attacked[0].radius:g}): {compared(attacked[0])}"
    return f"{said}."


def to_json(summary: Summary, results: Sequence[RunResult]) -> dict[str, Any]:
    """Return the content of `results.json`: summary and every run's accuracies, without the scores of single examples."""
    return {
        "baseline": summary.baseline,
        "confidence": summary.confidence,
        "interval_over": summary.over,
        "seeds": list(summary.seeds),
        "methods": [
            {
                "method": row.method,
                "seconds_per_update": _interval(row.seconds_per_update),
                "conditions": [
                    {
                        "condition": str(condition),
                        "modality": condition.modality or None,
                        "radius": condition.radius,
                        "accuracy": _interval(row.accuracy[condition]),
                        "difference": _interval(row.difference.get(condition)),
                        "p_value": row.p_value.get(condition),
                    }
                    for condition in summary.conditions
                ],
            }
            for row in summary.rows
        ],
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "seconds_per_update": run.seconds_per_update,
                "accuracy": {str(condition): scores.mean().item() for condition, scores in run.scores.items()},
                "examples": {str(condition): len(scores) for condition, scores in run.scores.items()},
            }
            for run in results
        ],
    }


def curve_figure(summary: Summary, *, title: str = "", chance: float | None = None) -> Any:
    """A matplotlib figure of accuracy against radius, one panel per modality, one line with error bars per method.

    The radius is to scale; at radius 0 stands the clean accuracy of the examples that were attacked. Methods stand a little
    beside each other, so that equal accuracies hide none of them.

    Arguments:
        chance: accuracy of the best constant answer, drawn as a line.

    Raises:
        DataError: nothing was attacked.
        MissingExtraError: matplotlib, of the extra `report`, is not installed.
    """
    modalities = list(dict.fromkeys(condition.modality for condition in summary.conditions if condition.modality))
    if not modalities:
        raise DataError("expected at least one modality that was attacked, got none; there is no curve to draw")
    figure = new_figure(figsize=(5.5 * len(modalities), 5.2))
    panels = figure.subplots(1, len(modalities), squeeze=False, sharey=True)[0]
    for panel, modality in zip(panels, modalities, strict=True):
        conditions = sorted(condition for condition in summary.conditions if condition.modality == modality)
        largest = conditions[-1].radius
        for index, row in enumerate(summary.rows):
            shift = 0.04 * largest * ((index + 0.5) / len(summary.rows) - 0.5)
            at = [condition.radius + shift for condition in conditions]
            draw_line(panel, at, [row.accuracy[condition] for condition in conditions], index=index, label=row.method)
        if chance is not None:
            panel.axhline(
                100 * chance, color="black", linewidth=0.8, linestyle=":", label="chance: one constant answer"
            )
        count = summary.examples[conditions[-1]]
        panel.set_xlabel(f"L2 radius of the {modality} perturbation ({count} test examples)")
        panel.set_xticks([condition.radius for condition in conditions])
        panel.set_xlim(-0.05 * largest, 1.05 * largest)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("worst-case accuracy, per cent")
    top = panels[0].get_ylim()[1]
    panels[0].set_ylim(-0.03 * top, top)  # room for whole markers at 0
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    point, interval = _over(summary).split(", ")
    what = f"Points: {point}; bars: {100 * summary.confidence:g} % {interval}"
    figure.suptitle(f"{title}\n{what}" if title else what, fontsize="medium")
    return figure


def _shown(summary: Summary) -> list[Condition]:
    """The conditions of the table: clean, clean on the attacked examples where these are fewer, and every radius."""
    whole = summary.examples[Condition()]
    fewer = next((c for c in summary.conditions if c.modality and not c.radius and summary.examples[c] < whole), None)
    attacked = [condition for condition in summary.conditions if condition.radius > 0]
    return [Condition(), *([] if fewer is None else [fewer]), *attacked]


def _head(condition: Condition, summary: Summary) -> str:
    if condition.radius:
        return f"{condition.modality} {condition.radius:g}"
    return f"clean, {summary.examples[condition]}" if condition.modality else "clean"


def _cell(interval: Interval | None, unit: float, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign, star = ("+", "*" if interval.excludes_zero() else "") if signed else ("", "")
    estimate = f"{unit * interval.estimate:{sign}.1f}"
    if math.isnan(interval.low):
        return estimate
    return f"{estimate} [{unit * interval.low:{sign}.1f}, {unit * interval.high:{sign}.1f}]{star}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def _tables(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """As few tables as keep within 100 columns, each with the methods in front."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) + 3 for column in columns]
    groups: list[list[int]] = []
    for index in range(1, len(columns)):
        if not groups or widths[0] + 1 + sum(widths[i] for i in groups[-1]) + widths[index] > _COLUMNS:
            groups.append([])
        groups[-1].append(index)
    picked = [[0, *group] for group in groups] or [[0]]
    return [_table([head[i] for i in some], [[row[i] for i in some] for row in rows]) for some in picked]


def _over(summary: Summary) -> str:
    if summary.over == "seeds":
        return f"mean of {len(summary.seeds)} seeds, t-interval over seeds"
    return f"seed {summary.seeds[0]} alone, Wilson interval over test examples"


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    ends = None if math.isnan(interval.low) else [interval.low, interval.high]
    return {"estimate": interval.estimate, "interval": ends, "count": interval.count, "method": interval.method}
