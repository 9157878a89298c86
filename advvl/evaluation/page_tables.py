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

from advvl.evaluation.comparisons import Comparison, comparisons
from advvl.evaluation.curves import accuracies, wins
from advvl.evaluation.measurement import Measurement, name_of


@dataclass(frozen=True)
class Table:
    """A table with a title, and a note on how to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    long: bool = False  # cells that wrap, whose lines would otherwise be of any length

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
        kind = "table long" if self.long else "table"
        scrolled = f'<div class="{kind}" role="region" aria-label="{label}" tabindex="0">{table}</div>'
        return f"<section>{title}{note}{scrolled}</section>"

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, tuple("---" for _ in self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)
        return "\n\n".join(filter(None, (f"## {plain(self.title)}", plain(self.note), table)))


def tables(
    measurements: Mapping[str, Measurement], *, confidence: float = 0.95, chance: float | None = None
) -> Iterator[Table]:
    """Yield the tables of accuracies and comparisons."""
    yield _accuracies(measurements, confidence, chance)
    if len(measurements) > 1:
        yield _comparisons(measurements, confidence)


def details(measurements: Mapping[str, Measurement]) -> Iterator[Table]:
    """Yield the tables of attacks and norms, and one of configuration, versions and time of each measurement."""
    yield _attacks(measurements)
    yield _norms(measurements)
    for name, one in measurements.items():
        rows = tuple(flat(one.about))
        if rows:
            yield Table(f"How {name} was measured", ("what", "value"), rows, long=True)


def unchecked(measurements: Mapping[str, Measurement]) -> list[tuple[str, str]]:
    """Name the checks on each measurement that were not made, each with the reason, as its entry `about["checks"]` records.

    The entry maps the name of each check to "made", or to "not made: " and the reason.

    Returns:
        Pairs of the model's name and a text.
    """
    found = []
    for name, one in measurements.items():
        checks = one.about.get("checks")
        if isinstance(checks, Mapping):
            missing = [
                (check, str(said).removeprefix("not made: ")) for check, said in checks.items() if said != "made"
            ]
            found += [(name, f"{check} ({reason})") for check, reason in missing]
        else:
            found.append((name, "it is not recorded which checks were made"))
    return found


def _accuracies(measurements: Mapping[str, Measurement], confidence: float, chance: float | None) -> Table:
    first = next(iter(measurements.values()))
    names = ["clean", *map(name_of, first.budgets)]
    columns = [[found.percent() for found in accuracies(one, confidence=confidence)] for one in measurements.values()]
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
    pairs = dict.fromkeys((one.first, one.second) for one in found)
    cells = {(one.first, one.second, one.budget): _compared(one) for one in found}
    return Table(
        "Which model is better",
        ("perturbation", *(f"{first} minus {second}" for first, second in pairs)),
        tuple(
            (budget, *(cells[(*pair, budget)] for pair in pairs)) for budget in dict.fromkeys(o.budget for o in found)
        ),
        f"Difference in points, paired by example [{100 * confidence:g} % Agresti-Min interval]; p of McNemar's exact test, "
        f"by Holm's correction for all {len(found)} comparisons (none for scores other than right and wrong).",
    )


def _compared(one: Comparison) -> str:
    return one.difference.percent(signed=True) + shown_p_value(one.p_value)


def shown_p_value(p_value: float | None) -> str:
    """Write a p-value behind a difference; nothing where there is none."""
    return "" if p_value is None else ", p < 0.001" if p_value < 0.001 else f", p {p_value:.3f}"


def _attacks(measurements: Mapping[str, Measurement]) -> Table:
    first = next(iter(measurements.values()))
    rows = [
        (name, name_of(budget), *(str(int(count)) for count in counts), str(int(left)), _count(still))
        for name, one in measurements.items()
        for budget, counts, left, still in zip(one.budgets, wins(one), _left(one), _stuck(one), strict=True)
    ]
    return Table(
        "Which attack won",
        ("model", "perturbation", *first.attacks, "not lost", "not moved"),
        tuple(rows),
        "Examples by the attack that first came to their lowest score at this budget; all attacks but the first leave out "
        "what was lost at a smaller one. Not lost: no attack lowered their score. Not moved: those of them that nothing "
        "moved, so that their score says nothing.",
    )


def _left(one: Measurement) -> Tensor:
    """The number of examples with a score that no attack lowered at a budget, `(R,)`."""
    return ((one.clean > 0) & (one.worst() >= one.clean)).sum(dim=1)


def _stuck(one: Measurement) -> Tensor:
    """The examples with a score left that no attack on them moved, `(R, N)` bool."""
    made = ~one.scores.isnan()
    return made.any(dim=1) & (one.unmoved | ~made).all(dim=1) & (one.worst() > 0)


def _norms(measurements: Mapping[str, Measurement]) -> Table:
    rows = [
        (name, name_of(budget), modality, *_spread(norms[r]))
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


def _count(flags: Tensor) -> str:
    return str(int(torch.count_nonzero(flags)))


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the entries of nested mappings, with dotted names, in words."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(item)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def plain(text: str) -> str:
    """Escape text so that Markdown shows it as it is: no markup, no HTML, in one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    marked = "".join(f"\\{letter}" if letter in "\\`*_|~" else letter for letter in escaped)
    return marked.replace("](", "]\\(")  # a link; brackets alone stay, as every interval has them
