"""The records of finished runs, as one table, one curve and one file of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advvl.errors import DataError
from advvl.evaluation.figures import write_figure
from advvl.evaluation.measurement import versions
from advvl.evaluation.protocol import EvaluationOptions
from advvl.evaluation.summary import Condition, RunResult, Summary, summarise
from advvl.evaluation.summary_report import curve_figure, markdown, to_json
from advvl.experiments.config import identity
from advvl.experiments.experiment import Row, Task
from advvl.experiments.options import ExperimentOptions
from advvl.files import read_json, write_json, write_text

_SEEDS_OF_EVIDENCE = 5
_TRAINING = ("updates", "seconds", "loss", "curve", "start")


def report(options: ExperimentOptions, rows: Sequence[Row], directory: Path, seconds: float) -> str:
    """Write `results.md`, `results.json` and the curve from the records of all rows and seeds; return the table.

    Arguments:
        rows: of the table; the others are compared with the first.
        seconds: that this call took.

    Raises:
        DataError: models that were tested on different examples.
    """
    records: dict[tuple[str, int], Mapping[str, Any]] = {
        (row.name, seed): read_json(directory / Task(seed, row).record) for row in rows for seed in options.seeds
    }
    label = label_of(options.preset, options.seeds)
    results = [_result(name, seed, record) for (name, seed), record in records.items()]
    summary = summarise(results, baseline=rows[0].name)
    chance = max((record["chance"] for record in records.values() if "chance" in record), default=None)
    data = {found for record in records.values() if (found := record.get("data_fingerprint")) is not None}
    if len(data) > 1:
        raise DataError(
            f"expected models tested on the same examples in {str(directory)!r}, got {len(data)} sets; give the data "
            "of the first run"
        )
    table = f"{label}\n\n{markdown(summary, caption=_caption(options.evaluation, summary, chance))}"
    facts = [
        {"method": name, "seed": seed} | {key: record[key] for key in _TRAINING if key in record}
        for (name, seed), record in records.items()
    ]
    document = {
        "label": label,
        "configuration": json.loads(json.dumps(identity(options)), parse_constant=str),  # an infinite radius
        "threads": options.threads,
        "versions": {name: versions_of(name, records.values()) for name in versions()},
        "chance": chance,
        "data_fingerprint": next(iter(data), None),
        "seconds_of_last_call": seconds,
        **to_json(summary, results),
        "training": facts,
    }
    write_text(directory / "results.md", table)
    write_figure(curve_figure(summary, title=label, chance=chance), directory / "accuracy_against_radius.png")
    write_json(directory / "results.json", document)
    return table


def versions_of(package: str, records: Iterable[Mapping[str, Any]]) -> str:
    """The version of a package that trained and attacked the models; all of them, of a run that went on under another."""
    return ", ".join(sorted({record.get("versions", {}).get(package, "not recorded") for record in records}))


def label_of(preset: str, seeds: Sequence[int]) -> str:
    """Say what kind of run it is; the demo's setting is evidence from five seeds on."""
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    if preset == "demo" and len(seeds) < _SEEDS_OF_EVIDENCE:
        return f"Quick demo, {count}: not evidence"
    return f"Preset {preset}, {count}"


def _result(method: str, seed: int, record: Mapping[str, Any]) -> RunResult:
    scores = dict(record["scores"])
    return RunResult.of(
        method,
        seed,
        clean=scores.pop("clean"),
        attacked={
            modality: {float(radius): worst for radius, worst in curve.items()} for modality, curve in scores.items()
        },
        seconds_per_update=record["seconds_per_update"],
    )


def _caption(attack: EvaluationOptions, summary: Summary, chance: float | None) -> str:
    """Say what the numbers rest on: examples, attacks, seeds."""
    attacked = [count for condition, count in summary.examples.items() if condition.modality]
    examples = f"{summary.examples[Condition()]} {attack.split} examples"
    seeds = f"seed{'s' * (len(summary.seeds) > 1)} {', '.join(map(str, summary.seeds))}"
    if not attacked:
        return f"Clean: {examples}; attacked: none; {seeds}."
    which = "all of them" if attacked[0] == summary.examples[Condition()] else f"the first {attacked[0]} of them"
    constant = "" if chance is None else f"One constant answer would score {100 * chance:.1f} %.\n"
    return (
        f"Clean: {examples}; attacked: {which}; {seeds}.\n{constant}"
        f"Attacks: L2 PGD on one modality at a time, {attack.steps} steps of {attack.step_fraction:g} of the radius,\n"
        f"restarts: {attack.restarts}, objectives: {', '.join(attack.objectives)}; the worst of all counts."
    )
