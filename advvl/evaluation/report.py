"""The report: tables with intervals, a curve, and the numbers behind them as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Final

from advvl.errors import DataError, missing_extra
from advvl.evaluation.statistics import Interval
from advvl.evaluation.summary import Report, RunResult

_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_LINES: Final = ("-", "--", "-.", ":")


def markdown(report: Report, *, caption: str = "") -> str:
    """Return the report as aligned Markdown tables, readable as plain text; accuracies in per cent.

    Arguments:
        caption: how the numbers came about, above the tables.
    """
    shown = [condition for condition in report.conditions if condition.radius > 0 or not condition.modality]
    percent = f"{100 * report.confidence:g} %"
    heads = [f"{c.modality} PGD, radius {c.radius:g}" if c.modality else "clean" for c in shown]
    accuracies = [
        [row.method, *(_cell(row.accuracy[c], 100) for c in shown), _cell(row.seconds_per_update, 1e3)]
        for row in report.rows
    ]
    parts = [
        *([caption] if caption else []),
        f"Accuracy in per cent [{percent} interval]; {_over(report)}.",
        _table(["method", *heads, "ms per update"], accuracies),
    ]
    others = [row for row in report.rows if row.method != report.baseline]
    if others:
        paired = "example, Agresti-Min interval" if report.over == "examples" else "seed, t-interval"
        parts += [
            f"Difference to {report.baseline} in points [{percent} interval], paired by {paired}; * where the interval "
            f"excludes 0, which is not corrected for the number of cells ({len(others) * len(shown)}): by chance alone "
            f"one cell in {1 / (1 - report.confidence):.0f} would have it.",
            _table(
                ["method", *heads],
                [[row.method, *(_cell(row.difference[c], 100, signed=True) for c in shown)] for row in others],
            ),
        ]
    if any(row.difference[c].low == row.difference[c].high for row in others for c in shown):
        parts.append("An interval without width says that every seed came to the same difference, not that it is sure.")
    parts.append(
        "Robust accuracy counts an example by the worst score that any attack reached; a stronger attack can only "
        "lower it."
    )
    return "\n\n".join(parts) + "\n"


def to_json(report: Report, results: Sequence[RunResult]) -> dict[str, Any]:
    """Return the content of `results.json`: summary and every run's accuracies, without the scores of single examples."""
    return {
        "baseline": report.baseline,
        "confidence": report.confidence,
        "interval_over": report.over,
        "seeds": list(report.seeds),
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
                    }
                    for condition in report.conditions
                ],
            }
            for row in report.rows
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


def curve_png(report: Report, *, title: str = "") -> bytes:
    """A PNG of `curve_figure`.

    Raises:
        DataError, MissingExtraError: as `curve_figure`.
    """
    buffer = io.BytesIO()
    curve_figure(report, title=title).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def curve_figure(report: Report, *, title: str = "") -> Any:
    """A matplotlib figure of accuracy against radius, one panel per modality, one line with error bars per method.

    Each radius has a column of its own, in which the methods stand side by side: equal accuracies hide none of them.

    Raises:
        DataError: nothing was attacked.
        MissingExtraError: matplotlib, of the extra `report`, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report") from error
    modalities = list(dict.fromkeys(condition.modality for condition in report.conditions if condition.modality))
    if not modalities:
        raise DataError("expected at least one modality that was attacked, got none; there is no curve to draw")
    figure = Figure(figsize=(5.5 * len(modalities), 5.2), layout="constrained")
    panels = figure.subplots(1, len(modalities), squeeze=False, sharey=True)[0]
    for panel, modality in zip(panels, modalities, strict=True):
        conditions = sorted(condition for condition in report.conditions if condition.modality == modality)
        for column in range(0, len(conditions), 2):
            panel.axvspan(column - 0.5, column + 0.5, color="black", alpha=0.05, linewidth=0)
        for index, row in enumerate(report.rows):
            intervals = [row.accuracy[condition] for condition in conditions]
            shift = 0.6 * ((index + 0.5) / len(report.rows) - 0.5)
            panel.errorbar(
                [column + shift for column in range(len(conditions))],
                [100 * interval.estimate for interval in intervals],
                yerr=[
                    [100 * (interval.estimate - interval.low) for interval in intervals],
                    [100 * (interval.high - interval.estimate) for interval in intervals],
                ],
                marker=_MARKERS[index % len(_MARKERS)],
                linestyle=_LINES[index % len(_LINES)],
                markersize=5,
                linewidth=1,
                alpha=0.85,
                capsize=2,
                label=row.method,
            )
        count = report.examples[conditions[-1]]
        panel.set_xlabel(f"L2 radius of the {modality} perturbation ({count} test examples)")
        panel.set_xticks(range(len(conditions)), [f"{condition.radius:g}" for condition in conditions])
        panel.set_xlim(-0.5, len(conditions) - 0.5)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("worst-case accuracy, per cent")
    top = panels[0].get_ylim()[1]
    panels[0].set_ylim(-0.03 * top, top)  # room for whole markers at 0
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    point, interval = _over(report).split(", ")
    what = f"Points: {point}; bars: {100 * report.confidence:g} % {interval}; methods side by side at each radius"
    figure.suptitle(f"{title}\n{what}" if title else what, fontsize="medium")
    return figure


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


def _over(report: Report) -> str:
    if report.over == "seeds":
        return f"mean of {len(report.seeds)} seeds, t-interval over seeds"
    return f"seed {report.seeds[0]} alone, Wilson interval over test examples"


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    ends = None if math.isnan(interval.low) else [interval.low, interval.high]
    return {"estimate": interval.estimate, "interval": ends, "count": interval.count, "method": interval.method}
