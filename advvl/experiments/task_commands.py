"""The commands `advvl train`, `advvl evaluate` and `advvl predict`: a task of UNITER on databases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

from advvl.errors import ConfigurationError
from advvl.evaluation.statistics import Interval
from advvl.experiments.command_line import parse
from advvl.experiments.measure import measure
from advvl.experiments.measure_options import EvaluateOptions
from advvl.experiments.predictions import write_predictions
from advvl.experiments.published_json import read_configuration
from advvl.experiments.task_scores import judged
from advvl.experiments.train import train
from advvl.experiments.train_options import TrainOptions
from advvl.files import write_json
from advvl.runtime.processes import process_index

T = TypeVar("T")

_DESCRIPTIONS: Final = {
    "train": "Train a task of UNITER on its databases, by CONFIG: a YAML file of examples/configs/uniter, or a JSON file of "
    "UNITER's or VILLA's own.",
    "evaluate": "Print the clean scores of a trained model on the val databases of CONFIG, each accuracy with its 95 % "
    "interval over examples, and write them as JSON; with "
    "--attack and --radius measure how robust it is, or several --checkpoints, and write a page.",
    "predict": "Write the predictions of a trained model for the val databases of CONFIG, as the task's server takes them.",
}


def train_command(arguments: Sequence[str]) -> None:
    """Run `advvl train`."""
    train(_parsed("train", arguments, TrainOptions))


def predict_command(arguments: Sequence[str]) -> None:
    """Run `advvl predict`."""
    options = _parsed("predict", arguments, TrainOptions)
    found, shards = judged(options)
    if not process_index():
        print(f"written to {write_predictions(options, found.predictions, Path(str(shards[0].texts.folder)).stem)}")


def evaluate_command(arguments: Sequence[str]) -> None:
    """Run `advvl evaluate`."""
    options = _parsed("evaluate", arguments, EvaluateOptions)
    if options.robustness.attack:
        page = measure(options)
        if not process_index():
            print(f"written to {page}")
        return
    found, shards = judged(options)
    if not found.scores:
        raise ConfigurationError(
            f"expected databases with targets in data.val_texts, got {', '.join(options.data.val_texts)}; see advvl predict"
        )
    if process_index():  # the main process has the whole outcome too
        return
    path = Path(options.output) / f"scores-{Path(str(shards[0].texts.folder)).stem}.json"
    write_json(path, dict(found.scores))
    intervals = found.intervals()
    for name, value in found.scores.items():
        print(f"{name:16} {value:.4f}{_shown(intervals[name]) if name in intervals else ''}")
    print(f"written to {path}")


def _shown(interval: Interval) -> str:
    """Write an interval behind its estimate."""
    ends, kind = f"[{interval.low:.4f}, {interval.high:.4f}]", f"{100 * interval.confidence:g} % {interval.method}"
    return f" {ends} {kind} interval over {interval.count} examples"


def _parsed(name: str, arguments: Sequence[str], options: type[T]) -> T:
    """Return the options of a command line, whose first word may be the file of `--config`."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    return parse(
        options,
        words,
        description=_DESCRIPTIONS[name],
        prog=f"advvl {name} [CONFIG]",
        read=read_configuration,
        file="YAML or JSON file",
    )
