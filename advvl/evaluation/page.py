"""The report page: one self-contained HTML file that says how robust models are, against what, and how sure that is.

Path("report.html").write_text(page({"standard": measured, "VILLA": other}, chance=0.2), encoding="utf-8")
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from itertools import islice

from advvl.checks import check_functions, is_number, is_whole, shown
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.comparisons import check_comparable
from advvl.evaluation.curves import curves_of
from advvl.evaluation.examples import Damage, Example, damages
from advvl.evaluation.measurement import Measurement, name_of
from advvl.evaluation.page_examples import example_html
from advvl.evaluation.page_seeds import seed_curves, seed_tables
from advvl.evaluation.page_style import STYLE
from advvl.evaluation.page_svg import curve_svg, legend
from advvl.evaluation.page_tables import details, tables, unchecked
from advvl.evaluation.seed_runs import SeedRuns, check_same_test
from advvl.evaluation.statistics import check_confidence

Draw = Callable[[Damage], Example]


def page(
    measurements: Mapping[str, Measurement],
    *,
    title: str = "Robustness",
    confidence: float = 0.95,
    chance: float | None = None,
    draw: Draw | None = None,
    examples: int = 8,
    runs: Mapping[str, SeedRuns] | None = None,
) -> str:
    """Write measurements of models on the same examples as one HTML page that makes no request.

    Arguments:
        measurements: by the models' names.
        title: of the page.
        confidence: of every interval, in (0, 1).
        chance: accuracy of the best constant answer, in [0, 1], drawn as a line; None: that of the measurements, if known.
        draw: from an example that an attack cost a model to how a person looks at it; None: no example is shown.
        examples: how many of them, of each model.
        runs: results of experiments over seeds by their names, shown beside the measurements or alone.

    Raises:
        DataError: nothing to show; measurements of other examples, budgets, attacks, tasks, data or versions; experiments of
            other settings or data.
        ConfigurationError: a chance outside [0, 1], a confidence outside (0, 1), a `draw` that is no function, a title or
            names that are no text.
    """
    runs = runs or {}
    _check(measurements, title, confidence, chance, examples, runs)
    check_functions(draw=draw)
    chance = chance_of(measurements, chance)
    head = html.escape(title)
    count = [f"{len(one.clean)} examples; " for one in measurements.values()][:1]
    names = ", ".join([*measurements, *runs])
    said = f"{''.join(count)}{names}. Every accuracy has its {100 * confidence:g} % interval."
    parts = [f"<header><h1>{head}</h1><p>{html.escape(said)}</p></header>"]
    if measurements:
        parts += [
            _flags(measurements),
            _curves(measurements, confidence, chance),
            *(table.html() for table in tables(measurements, confidence=confidence, chance=chance)),
            *([] if draw is None else [_examples(measurements, draw, examples)]),
        ]
    if runs:
        parts.append(seed_curves(runs, confidence=confidence))
        parts += [table.html() for table in seed_tables(runs, confidence=confidence)]
    if measurements:
        parts += [table.html() for table in details(measurements)]
    body = "\n".join(filter(None, parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{head}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _check(
    measurements: Mapping[str, Measurement],
    title: str,
    confidence: float,
    chance: float | None,
    examples: int,
    runs: Mapping[str, SeedRuns],
) -> None:
    if not isinstance(measurements, Mapping) or not all(isinstance(one, Measurement) for one in measurements.values()):
        found = measurements.values() if isinstance(measurements, Mapping) else [measurements]
        kinds = sorted({type(one).__name__ for one in found if not isinstance(one, Measurement)} or {"Measurement"})
        raise DataError(
            f"expected {{name: Measurement}}, got {kinds}; read files by Measurement.load, and name each model"
        )
    check_shown(measurements, runs)
    for what, named in (("a title", title), *(("names of models", name) for name in [*measurements, *runs])):
        if not isinstance(named, str):
            raise ConfigurationError(f"expected {what} as text, got {shown(named)}")
    check_confidence(confidence)
    if chance is not None and not (is_number(chance) and 0 <= chance <= 1):
        raise ConfigurationError(f"expected chance as an accuracy in [0, 1], or None, got {chance!r}")
    if not is_whole(examples) or examples < 1:
        raise ConfigurationError(f"expected 1 or more examples of each model, got {examples!r}; or draw=None")


def check_shown(measurements: Mapping[str, Measurement], runs: Mapping[str, SeedRuns]) -> None:
    """Check that a report can show these together.

    Raises:
        DataError: nothing; measurements, or experiments, that are not of the same test.
    """
    if measurements or not runs:
        check_comparable(measurements)
    check_same_test(runs)


def chance_of(measurements: Mapping[str, Measurement], given: float | None = None) -> float | None:
    """The accuracy of the best constant answer: as given, or as `about["chance"]` of measurements records it.

    Raises:
        DataError: one is recorded that is no accuracy.
    """
    if given is not None:
        return given
    found = next((one.about.get("chance") for one in measurements.values()), None)
    if found is not None and not (is_number(found) and 0 <= found <= 1):
        raise DataError(f"expected the chance that measurements record to be in [0, 1], got {shown(found)}")
    return found


def _flags(measurements: Mapping[str, Measurement]) -> str:
    """The findings that put the figures in doubt, and the checks that were not made, to stand above them."""
    items = [
        f"<li><strong>{html.escape(name)}: {html.escape(flag.name)}.</strong> {html.escape(flag.detail)}</li>"
        for name, one in measurements.items()
        for flag in one.flags
    ]
    missing = "".join(f"<li>{html.escape(name)}: {html.escape(said)}</li>" for name, said in unchecked(measurements))
    skipped = f"<p>Not checked:</p><ul>{missing}</ul>" if missing else ""
    if not items:
        made = "by the checks that were made" if missing else "against these figures"
        return f"<section><p>No flag was raised {made}.</p>{skipped}</section>"
    return (
        f'<section class="flags" role="alert"><h2>Do not trust these figures yet</h2><ul>{"".join(items)}</ul></section>'
        + (f"<section>{skipped}</section>" if skipped else "")
    )


def _curves(measurements: Mapping[str, Measurement], confidence: float, chance: float | None) -> str:
    found = {name: {curve.kind: curve for curve in curves_of(one)} for name, one in measurements.items()}
    kinds = next(iter(found.values()))
    if not kinds:
        return ""
    drawn = "".join(
        f"<div><h3>{html.escape(kind)}</h3>"
        + curve_svg({name: curves[kind] for name, curves in found.items()}, confidence=confidence, chance=chance)
        + "</div>"
        for kind in kinds
    )
    note = f"Lines: worst-case accuracy; bands: {100 * confidence:g} % Wilson interval over examples. Radius to scale."
    return (
        f"<section><h2>Accuracy against radius</h2><p>{note}</p>{legend(list(measurements))}"
        f'<div class="curves">{drawn}</div></section>'
    )


def _examples(measurements: Mapping[str, Measurement], draw: Draw, count: int) -> str:
    figures = [
        example_html(damage, draw(damage), _how(one, damage))
        for name, one in measurements.items()
        for damage in islice(damages(name, one), count)
    ]
    if not figures:
        return "<section><h2>Most damaging examples</h2><p>No attack cost any model an example.</p></section>"
    note = (
        "Those whose score fell furthest first; of equal falls, those within the earlier budget of the table. Tint and "
        "answers are of an attack that was made again to draw the example; score and length are those measured. The "
        "stronger the tint, the further that word or region was moved."
    )
    return (
        f'<section><h2>Most damaging examples</h2><p>{note}</p><div class="examples">{"".join(figures)}</div></section>'
    )


def _how(measurement: Measurement, damage: Damage) -> str:
    budget = measurement.budgets[damage.budget]
    return f"{measurement.attacks[damage.attack]} within {name_of(budget)}"
