"""The report: tables with intervals, a curve, and the numbers behind them as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from advvl.errors import DataError, missing_extra
from advvl.evaluation.statistics import Interval
from advvl.evaluation.summary import Report, RunResult


def markdown(report: Report) -> str:
    """The report as aligned Markdown tables, readable as plain text; accuracies in per cent."""
    shown = [condition for condition in report.conditions if condition.radius > 0 or not condition.modality]
    percent = f"{100 * report.confidence:g} %"
    heads = [f"{c.modality} PGD, radius {c.radius:g}" if c.modality else "clean" for c in shown]
    accuracies = [
        [row.method, *(_cell(row.accuracy[c], 100) for c in shown), _cell(row.seconds_per_update, 1e3)]
        for row in report.rows
    ]
    parts = [
        f"Accuracy in per cent [{percent} interval]; {_over(report)}.",
        _table(["method", *heads, "ms per update"], accuracies),
    ]
    others = [row for row in report.rows if row.method != report.baseline]
    if others:
        paired = "example" if report.over == "examples" else "seed"
        parts += [
            f"Difference to {report.baseline} in points [{percent} interval], paired by {paired}; "
            "* where the interval excludes 0.",
            _table(
                ["method", *heads],
                [[row.method, *(_cell(row.difference[c], 100, signed=True) for c in shown)] for row in others],
            ),
        ]
    parts.append(
        "Robust accuracy counts an example by the worst score that any attack reached; a stronger attack can only "
        "lower it."
    )
    return "\n\n".join(parts) + "\n"


def to_json(report: Report, results: Sequence[RunResult]) -> dict[str, Any]:
    """What `results.json` holds: summary and every run's accuracies, without the scores of single examples."""
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
    """A PNG of accuracy against radius, one panel a modality, one line with error bars a method.

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
    figure = Figure(figsize=(5.5 * len(modalities), 4.2), layout="constrained")
    panels = figure.subplots(1, len(modalities), squeeze=False, sharey=True)[0]
    for panel, modality in zip(panels, modalities, strict=True):
        conditions = sorted(condition for condition in report.conditions if condition.modality == modality)
        reach = conditions[-1].radius
        for index, row in enumerate(report.rows):
            intervals = [row.accuracy[condition] for condition in conditions]
            # Side by side, so that no error bar hides another.
            shift = 0.012 * reach * (index - (len(report.rows) - 1) / 2)
            panel.errorbar(
                [condition.radius + shift for condition in conditions],
                [100 * interval.estimate for interval in intervals],
                yerr=[
                    [100 * (interval.estimate - interval.low) for interval in intervals],
                    [100 * (interval.high - interval.estimate) for interval in intervals],
                ],
                marker="o",
                markersize=4,
                capsize=3,
                label=row.method,
            )
        panel.set_xlabel(f"L2 radius of the {modality} perturbation, per example")
        panel.set_xticks([condition.radius for condition in conditions])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("worst-case accuracy, per cent")
    panels[0].set_ylim(bottom=0)
    panels[0].legend()
    figure.suptitle(
        title or f"Accuracy under PGD; bars: {100 * report.confidence:g} %, {_over(report)}", fontsize="medium"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


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
