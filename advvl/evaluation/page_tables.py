"""The tables of a report, as data that HTML and Markdown are made of."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advvl.evaluation.curves import accuracies, comparisons, kind_of, radii_of, wins
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.statistics import Interval


@dataclass(frozen=True)
class Table:
    """A table with a title, and a note on how to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def html(self) -> str:
        """The table in HTML, every cell escaped; it scrolls by itself where it is wider than the page."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.head)
        rows = "".join(
            f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
            for first, *cells in self.rows
        )
        label = html.escape(self.title, quote=True)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        title = f"<h2>{html.escape(self.title)}</h2>"
        scrolled = f'<div class="table" role="region" aria-label="{label}" tabindex="0">{table}</div>'
        return f"<section>{title}{note}{scrolled}</section>"

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)
        return "\n\n".join(filter(None, (f"## {_plain(self.title)}", _plain(self.note), table)))


def tables(
    measurements: Mapping[str, Measurement], *, confidence: float = 0.95, chance: float | None = None
) -> Iterator[Table]:
    """Yield the tables of accuracies, comparisons, attacks and norms."""
    yield _accuracies(measurements, confidence, chance)
    if len(measurements) > 1:
        yield _comparisons(measurements, confidence)
    yield _attacks(measurements)
    yield _norms(measurements)


def facts(measurements: Mapping[str, Measurement]) -> Iterator[Table]:
    """Yield a table of configuration, versions and time of each measurement."""
    for name, one in measurements.items():
        rows = tuple(_flat(one.about))
        if rows:
            yield Table(f"How {name} was measured", ("what", "value"), rows)


def percent(interval: Interval, *, signed: bool = False) -> str:
    """An interval in per cent, such as "61.5 [54.6, 68.0]"."""
    sign = "+" if signed else ""
    return f"{100 * interval.estimate:{sign}.1f} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def _accuracies(measurements: Mapping[str, Measurement], confidence: float, chance: float | None) -> Table:
    first = next(iter(measurements.values()))
    names = ["clean", *map(_named, first.budgets)]
    columns = [map(percent, accuracies(one, confidence=confidence)) for one in measurements.values()]
    rows = tuple(zip(names, *columns, strict=True))
    floor = "" if chance is None else f" Chance level: {100 * chance:.1f} %."
    return Table(
        "Accuracy under attack",
        ("perturbation", *measurements),
        rows,
        f"Per cent of {len(first.clean)} examples [{100 * confidence:g} % Wilson interval over examples], each by the worst "
        f"score that any attack found within the budget; a stronger attack can only lower it.{floor}",
    )


def _comparisons(measurements: Mapping[str, Measurement], confidence: float) -> Table:
    found = comparisons(measurements, confidence=confidence)
    rows = tuple(
        (f"{one.first} less {one.second}", one.budget, percent(one.difference, signed=True), _verdict(one.difference))
        for one in found
    )
    return Table(
        "Which model is better",
        ("models", "perturbation", "difference in points", "verdict"),
        rows,
        f"Paired by example [{100 * confidence:g} % Agresti-Min interval], not corrected for {len(found)} comparisons.",
    )


def _verdict(difference: Interval) -> str:
    if not difference.excludes_zero():
        return "no difference seen"
    return "better" if difference.estimate > 0 else "worse"


def _attacks(measurements: Mapping[str, Measurement]) -> Table:
    rows = [
        (name, _named(budget), attack, str(int(count)), _count(unmoved), _count(made))
        for name, one in measurements.items()
        for budget, counts, still, tried in zip(one.budgets, wins(one), one.unmoved, ~one.scores.isnan(), strict=True)
        for attack, count, unmoved, made in zip(one.attacks, counts, still, tried, strict=True)
    ]
    return Table(
        "Which attack won",
        ("model", "perturbation", "attack", "won", "did not move", "tried"),
        tuple(rows),
        "Won: examples whose lowest score this attack found first. Tried: examples that still had a score to lose. One "
        "that no attack moved says nothing about robustness.",
    )


def _norms(measurements: Mapping[str, Measurement]) -> Table:
    rows = [
        (name, _named(budget), modality, *_spread(norms[r]))
        for name, one in measurements.items()
        for r, budget in enumerate(one.budgets)
        for modality, norms in one.norms.items()
        if modality in budget
    ]
    return Table(
        "Lengths of the perturbations",
        ("model", "perturbation", "modality", "median", "largest"),
        tuple(rows),
        "Measured on the perturbations themselves, in the norm of their budget.",
    )


def _spread(norms: Tensor) -> tuple[str, str]:
    known = norms[~norms.isnan()]
    return ("-", "-") if not known.numel() else (f"{float(known.median()):.4g}", f"{float(known.max()):.4g}")


def _named(budget: Any) -> str:
    return f"{kind_of(budget)} {radii_of(budget)}"


def _count(flags: Tensor) -> str:
    return str(int(torch.count_nonzero(flags)))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(item)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, in one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in escaped)
