"""Accuracy-radius curves as inline SVG: radius to scale, a band of intervals, chance level."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from advvl.evaluation.statistics import Interval

COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which people tell apart whatever their colour vision; without black and yellow, which vanish on
a dark or a light ground (Okabe & Ito, Color Universal Design, 2008)."""

_DASHES: Final = ("", "7 3", "2 3", "9 3 2 3")
_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 48


class Drawable(Protocol):
    """A curve of accuracies against radius, such as a `Curve` or a `SeedCurve`."""

    @property
    def kind(self) -> str:
        """The kind of perturbation, such as "image (L2)"."""

    @property
    def radii(self) -> tuple[float, ...]:
        """The radii, ascending, above 0."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The radii in words."""

    def intervals(self, *, confidence: float = 0.95) -> tuple[Interval, ...]:
        """The interval of the accuracy at radius 0 and at each of the radii."""


def curve_svg(curves: Mapping[str, Drawable], *, confidence: float = 0.95, chance: float | None = None) -> str:
    """Draw the curves of several models under budgets of one kind, as an SVG element with a description.

    Arguments:
        curves: by the models' names; their colours, dashes and markers follow the order.
        confidence: of the bands.
        chance: an accuracy in [0, 1], drawn as a dotted line; None: none.
    """
    first = next(iter(curves.values()))
    largest = first.radii[-1] or 1.0
    radii = (0.0, *first.radii)
    found = {name: curve.intervals(confidence=confidence) for name, curve in curves.items()}
    said = "; ".join(f"{name}: {_described(radii, intervals)}" for name, intervals in found.items())
    parts = [_axes(first, largest)]
    if chance is not None:
        y = _y(chance)
        parts.append(
            f'<line class="chance" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="chance" x="{_WIDTH - _RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">chance</text>'
        )
    bands = [_band(i, radii, intervals, largest) for i, intervals in enumerate(found.values())]
    lines = [_line(i, radii, intervals, largest) for i, intervals in enumerate(found.values())]
    label = html.escape(f"Accuracy against the radius of {first.kind}. {said}", quote=True)
    drawn = "".join([*parts, *bands, *lines])
    return f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{drawn}</svg>'


def legend(names: Sequence[str]) -> str:
    """The models' names beside their line and marker, in HTML."""
    items = "".join(
        f'<li><svg viewBox="0 0 36 14" width="36" height="14" aria-hidden="true"><line x1="1" x2="35" y1="7" y2="7" '
        f"{_stroke(i)}/>{_marker(i, 18, 7)}</svg> {html.escape(name)}</li>"
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _described(radii: Sequence[float], intervals: Sequence[Interval]) -> str:
    return ", ".join(f"{100 * one.estimate:.1f} % at {radius:g}" for radius, one in zip(radii, intervals, strict=True))


def _x(radius: float, largest: float) -> float:
    return _LEFT + 8 + radius / largest * (_WIDTH - _LEFT - _RIGHT - 24)


def _y(accuracy: float) -> float:
    return _TOP + (1 - accuracy) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(curve: Drawable, largest: float) -> str:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _y(share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * share:g} %</text>')
    after = -math.inf
    for radius, mark in zip((0.0, *curve.radii), ("0", *curve.marks), strict=True):
        x, half = _x(radius, largest), 3.6 * len(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(0):.1f}" y2="{_y(0) + 4:.1f}"/>')
        if x - half > after:  # a mark that would run into the one before is left out
            anchor = "end" if x + half > _WIDTH else "middle"
            parts.append(f'<text x="{x:.1f}" y="{_y(0) + 18:.1f}" text-anchor="{anchor}">{html.escape(mark)}</text>')
            after = x + half + 4
    name = html.escape(f"radius of {curve.kind}")
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{name}</text>')
    return "".join(parts)


def _band(i: int, radii: Sequence[float], intervals: Sequence[Interval], largest: float) -> str:
    upper = [f"{_x(radius, largest):.1f},{_y(one.high):.1f}" for radius, one in zip(radii, intervals, strict=True)]
    lower = [f"{_x(radius, largest):.1f},{_y(one.low):.1f}" for radius, one in zip(radii, intervals, strict=True)]
    return f'<polygon class="band" fill="{_color(i)}" points="{" ".join([*upper, *reversed(lower)])}"/>'


def _line(i: int, radii: Sequence[float], intervals: Sequence[Interval], largest: float) -> str:
    points = [(_x(radius, largest), _y(one.estimate)) for radius, one in zip(radii, intervals, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    markers = "".join(_marker(i, x, y) for x, y in points)
    return f'<polyline fill="none" {_stroke(i)} points="{line}"/>{markers}'


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _stroke(i: int) -> str:
    # with each round of the colours the dashes go one on, so that no two models are drawn alike
    dash = _DASHES[(i + i // len(COLORS)) % len(_DASHES)]
    return f'stroke="{_color(i)}" stroke-width="2" stroke-dasharray="{dash or "none"}"'


def _marker(i: int, x: float, y: float) -> str:
    fill = f'fill="{_color(i)}"'
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {fill}/>',
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {fill}/>',
        f'<path d="M{x:.1f} {y - 5:.1f} l5 9 h-10 z" {fill}/>',
        f'<path d="M{x:.1f} {y - 5.5:.1f} l5.5 5.5 l-5.5 5.5 l-5.5 -5.5 z" {fill}/>',
        f'<path d="M{x:.1f} {y + 5:.1f} l5 -9 h-10 z" {fill}/>',
    )
    return shapes[i % len(shapes)]
