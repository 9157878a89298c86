"""The report's plots: every way against the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator
from records import Row, Run, bare_passes, copy_of, is_copy

BLUE, SKY, RED, ORANGE, GREEN, PINK, GREY = (
    *("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#7F7F7F"),
)
STYLES = {  # by the beginning of a name, the first that fits: marker, colour, filled
    "ours, fresh": ("s", SKY, True),
    "ours, reference": ("s", SKY, True),
    "ours, cpu, masked": ("o", BLUE, False),
    "ours, triton, masked": ("o", BLUE, False),
    "ours": ("o", BLUE, True),
    "unavoidable, fresh": ("s", SKY, False),
    "unavoidable": ("o", BLUE, False),
    "published loop, eager": ("v", ORANGE, True),
    "published update, compiled": ("v", ORANGE, True),
    "published": ("^", RED, True),
    "torchattacks": ("D", GREEN, True),
    "foolbox": ("P", PINK, True),
    "captum": ("X", GREY, True),
    "FreeLB": ("*", "black", True),
}


def dots(axes: Any, lanes: Mapping[str, Mapping[str, tuple[float, float, float]]], names: Sequence[str]) -> None:
    """One line a case, one marker a way: (low, middle, high) of each."""
    cases = list(lanes)
    for i, name in enumerate(names):
        places = [(len(cases) - 1 - j, lanes[case][name]) for j, case in enumerate(cases) if name in lanes[case]]
        if not places:
            continue
        shift = 0.5 * (0.5 - i / max(1, len(names) - 1))
        middle = [value[1] for _, value in places]
        errors = [[max(0.0, m - low) for _, (low, m, _) in places], [max(0.0, high - m) for _, (_, m, high) in places]]
        marker, colour, filled = next(style for start, style in STYLES.items() if name.startswith(start))
        axes.errorbar(
            middle,
            [y + shift for y, _ in places],
            xerr=errors,
            fmt=marker,
            color=colour,
            markerfacecolor=colour if filled else "white",
            markersize=6,
            elinewidth=1,
            label=name,
        )
    axes.set_yticks(range(len(cases)), list(reversed(cases)))
    axes.set_ylim(-0.6, len(cases) - 0.4)
    for y in range(len(cases) - 1):
        axes.axhline(y + 0.5, color="0.9", linewidth=0.8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def relative(row: Row, to: Row, *, speed: bool = False) -> tuple[float, float, float]:
    """Time (or speed) of a row over the median of another: lower quartile, median, upper quartile."""
    if speed:
        return to.median / row.q3, to.median / row.median, to.median / row.q1
    return row.q1 / to.median, row.median / to.median, row.q3 / to.median


def draw_ops(run: Run, path: Path, plt: Any) -> None:
    grouped: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for case, lanes in run.cases("ops").items():
        shape, _, rest = case.partition(", ")
        values = {n: relative(row, copy_of(lanes), speed=True) for n, row in lanes.items() if not is_copy(n)}
        grouped.setdefault(rest, {})[shape] = values
    grouped = {title: cases for title, cases in grouped.items() if len(cases) > 1} or grouped
    names = list(dict.fromkeys(n for cases in grouped.values() for lanes in cases.values() for n in lanes))
    columns = 1 if len(grouped) <= 4 else 2
    lines = max(len(cases) for cases in grouped.values())
    size = (8.5 * columns, (0.9 + 0.5 * lines) * math.ceil(len(grouped) / columns))
    figure, panels = plt.subplots(
        math.ceil(len(grouped) / columns), columns, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (title, cases) in zip(panels.flat, grouped.items(), strict=False):
        dots(axes, cases, names)
        axes.axvline(1, color="black", linewidth=1.2, linestyle="--")
        axes.set_xscale("log")
        axes.set_title(f"Update of one perturbation, {title}", fontsize=10)
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["2%", "5%", "10%", "20%", "50%", "100%"])
    for axes in panels[-1]:
        axes.set_xlabel("share of the speed of a copy of the same bytes (dashed: the copy)")
    _finish(figure, path)


def draw_bars(run: Run, suite: str, label: str, path: Path, plt: Any) -> None:
    cases = {}
    for case, lanes in run.cases(suite).items():
        bare = bare_passes(lanes)
        if bare:
            cases[case] = {name: relative(row, bare) for name, row in lanes.items() if row is not bare}
    names = list(dict.fromkeys(name for lanes in cases.values() for name in lanes))
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.75 * len(cases)), layout="constrained")
    dots(axes, cases, names)
    axes.axvline(1, color="black", linewidth=1.2, linestyle="--")
    axes.set_xlabel(label)
    _finish(figure, path)


def draw_memory(run: Run, path: Path, plt: Any) -> None:
    cases = {
        case: {
            name: (row.facts["graphs"],) * 3 for name, row in lanes.items() if name.startswith(("ours", "published"))
        }
        for case, lanes in run.cases("step").items()
    }
    names = list(dict.fromkeys(name for lanes in cases.values() for name in lanes))
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.5 * len(cases)), layout="constrained")
    dots(axes, cases, names)
    axes.set_xlim(left=0)
    axes.set_xlabel("peak memory of a VILLA update, in graphs of one pass")
    _finish(figure, path)


def draw_scaling(run: Run, path: Path, plt: Any) -> None:
    rows = [row for lanes in run.cases("scaling").values() for row in lanes.values()]
    axis_names = list(dict.fromkeys(row.facts["axis"] for row in rows))
    figure, panels = plt.subplots(1, len(axis_names), figsize=(3.2 * len(axis_names), 3.4), layout="constrained")
    for axes, axis in zip(panels, axis_names, strict=True):
        for i, row in enumerate(row for row in rows if row.facts["axis"] == axis):
            points, colour = row.facts["points"], (SKY, BLUE)[i]
            x, time = [p["x"] for p in points], [1e3 * p["median"] for p in points]
            work = [p["flops"] for p in points]
            scale = time[-1] / work[-1]
            axes.plot(x, time, "so"[i], color=colour, label=f"{row.facts['masks']} masks, measured")
            axes.plot(
                x,
                [w * scale for w in work],
                "--",
                color=colour,
                linewidth=1,
                label="as its operations grow" if i else None,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [str(value) for value in x])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.grid(color="0.9")
    panels[0].set_ylabel("ms an update")
    _finish(figure, path)


def _finish(figure: Any, path: Path) -> None:
    """Save it under one legend for all panels."""
    seen: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    columns = min(4, len(seen))
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
