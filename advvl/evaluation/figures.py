"""Figures of matplotlib: made, drawn on, and written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from advvl.checks import path_of
from advvl.errors import missing_extra
from advvl.evaluation.statistics import Interval
from advvl.files import replacing

_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_LINES: Final = ("-", "--", "-.", ":")


def new_figure(**options: Any) -> Any:
    """Make a figure of matplotlib, its panels laid out so that no text overlaps.

    Arguments:
        options: as matplotlib's `Figure` takes them.

    Raises:
        MissingExtraError: matplotlib, of the extra `report`, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report") from error
    return Figure(layout="constrained", **options)


def draw_line(panel: Any, at: Sequence[float], intervals: Sequence[Interval], *, index: int, label: str) -> None:
    """Draw accuracies with error bars, in per cent, into a panel of a matplotlib figure.

    Arguments:
        at: where on the horizontal axis.
        index: which of the panel's lines; it decides the marker.
    """
    panel.errorbar(
        at,
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
        label=label,
    )


def write_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a PNG, whole or not at all."""
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=150)
    return path_of(path)
