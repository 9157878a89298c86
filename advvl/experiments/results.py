"""What finished runs left in an output directory, as one table, one curve and one file of numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from advvl.errors import OutputDirectoryError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.evaluation.report import curve_png, markdown, to_json
from advvl.evaluation.summary import Condition, Report, RunResult, summarise
from advvl.experiments.config import identity
from advvl.experiments.outputs import OWNER_FILE, OutputDirectory
from advvl.files import write_bytes, write_json, write_text

_TRAINING = ("updates", "seconds", "loss", "start")


class OutputOptions(Protocol):
    """The options that say where results go; the class is a dataclass that `advvl.experiments.config` can read."""

    @property
    def output(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    @property
    def overwrite(self) -> bool: ...


def claim(options: OutputOptions) -> OutputDirectory:
    """The output directory of these options.

    Errors: `OutputDirectoryError` if it is another configuration's, or holds results that are neither to be taken up
    (`resume`) nor to be lost (`overwrite`).
    """
    directory = OutputDirectory.claim(options.output, identity(options), overwrite=options.overwrite)
    if any(directory.path.glob("seed-*/*")):
        if options.overwrite:
            directory.clear()
        elif not options.resume:
            raise OutputDirectoryError(
                f"expected no results in {options.output!r}, got some of this very configuration; pass --resume to go "
                "on from them, --overwrite to lose them, or another --output"
            )
    return directory


@contextmanager
def released_if_empty(options: OutputOptions) -> Iterator[None]:
    """On an error, take back the claim on an output directory that was claimed within and got nothing to hold."""
    owner = Path(options.output, OWNER_FILE)
    claimed_before = owner.exists()
    try:
        yield
    except BaseException:
        if not claimed_before and owner.exists() and list(owner.parent.iterdir()) == [owner]:
            owner.unlink()
        raise


@contextmanager
def announced(what: str, *, when: bool) -> Iterator[None]:
    """Say on standard error that something begins and, once it is done, how long it took; only `when` that is wanted."""
    if when:
        print(f"{what}: started", file=sys.stderr, flush=True)
    began = time.monotonic()
    yield
    if when:
        print(f"{what}: done in {duration(time.monotonic() - began)}", file=sys.stderr, flush=True)


def publish(
    directory: OutputDirectory,
    records: Mapping[tuple[str, int], Mapping[str, Any]],
    *,
    baseline: str,
    label: str,
    evaluation: EvaluationOptions,
    document: Mapping[str, Any],
) -> str:
    """Write `results.md`, `results.json` and the curve; the table.

    Arguments:
        records: of each method and seed, as `advvl.experiments.uniter_stages` writes them.
        baseline: the method that others are compared with.
        label: what kind of run it is, in a few words, above everything.
        document: what `results.json` says besides.
    """
    results = [_result(method, seed, record) for (method, seed), record in records.items()]
    summary = summarise(results, baseline=baseline)
    table = f"{label}\n\n{markdown(summary, caption=_caption(evaluation, summary))}"
    facts = [
        {"method": method, "seed": seed} | {key: record[key] for key in _TRAINING}
        for (method, seed), record in records.items()
    ]
    write_text(directory / "results.md", table)
    write_bytes(directory / "accuracy_against_radius.png", curve_png(summary, title=label))
    write_json(directory / "results.json", {"label": label, **document, **to_json(summary, results), "training": facts})
    return table


def label_of(preset: str, seeds: Sequence[int]) -> str:
    """What kind of run it is."""
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"Quick demo, {count}: not evidence" if preset == "demo" else f"Preset {preset}, {count}"


def duration(seconds: float) -> str:
    """As minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


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


def _caption(attack: EvaluationOptions, summary: Report) -> str:
    """On what the numbers rest: examples, attacks, seeds."""
    attacked = [count for condition, count in summary.examples.items() if condition.modality]
    examples = f"{summary.examples[Condition()]} {attack.split} examples"
    seeds = f"seed{'s' * (len(summary.seeds) > 1)} {', '.join(map(str, summary.seeds))}"
    if not attacked:
        return f"Clean: {examples}; attacked: none; {seeds}."
    return (
        f"Clean: {examples}; attacked: the first {attacked[0]} of them; {seeds}.\n"
        f"Attacks: L2 PGD on one modality at a time, {attack.steps} steps of {attack.step_fraction:g} of the radius, "
        f"restarts: {attack.restarts}, objectives: {', '.join(attack.objectives)}; the worst of all counts."
    )
