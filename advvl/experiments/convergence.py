"""Accuracy against updates: held-out scores while a model trains, and the picture of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import nn

from advvl.data.source import BatchSource
from advvl.data.uniter.sources import CaptionSource
from advvl.evaluation.figures import draw_line, new_figure, write_figure
from advvl.evaluation.objectives import as_scores, score
from advvl.evaluation.statistics import Interval, mean_interval
from advvl.experiments.experiment import Row, Task
from advvl.files import read_json, write_text

_ROWS: Final = 250  # of a batch
_MOST: Final = 1000  # examples that are scored, the first ones


def words_guessed(source: CaptionSource) -> Callable[[nn.Module], float]:
    """Make the score of a pre-trained model: the share of masked words of these captions that it guesses."""
    words = replace(source, tasks=("mlm",), negatives=None)

    def share(model: nn.Module) -> float:
        hits = [
            output.logits.argmax(1) == batch["txt_labels"][batch["txt_labels"] != -1]
            for batch, output in _outputs(model, words)
        ]
        return float(torch.cat(hits).double().mean())

    return share


def answered(source: BatchSource) -> Callable[[nn.Module], float]:
    """Make the score of a fine-tuned model: its accuracy on these labelled examples."""

    def accuracy(model: nn.Module) -> float:
        scores = [
            score(output.logits, as_scores(batch["targets"], output.logits))
            for batch, output in _outputs(model, source)
        ]
        return float(torch.cat(scores).double().mean())

    return accuracy


def _outputs(model: nn.Module, source: BatchSource) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield batches, the same ones at every call, and the model's outputs for them."""
    device = next(model.parameters()).device
    count = min(len(source), _MOST)
    for first in range(0, count, _ROWS):
        generator = torch.Generator().manual_seed(first)
        batch = send_to_device(source.batch(range(first, min(first + _ROWS, count)), generator), device)
        with torch.no_grad():
            yield batch, model(**batch)


def report_convergence(
    rows: Sequence[Row], seeds: Sequence[int], directory: Path, *, pretrained: str, finetuned: str
) -> str:
    """Write `accuracy_against_updates.{md,png}` from the curves in the records; return the tables.

    Arguments:
        rows: those of the table; with the rows that they start from.
        pretrained, finetuned: what the scores of either stage are.

    Raises:
        MissingExtraError: matplotlib, of the extra `report`, is not installed.
    """
    stages = {pretrained: [row.start for row in rows if isinstance(row.start, Row)], finetuned: rows}
    figure = new_figure(figsize=(11, 5.2))
    panels = figure.subplots(1, len(stages))
    tables = []
    for panel, (what, trained) in zip(panels, stages.items(), strict=True):
        lines = {row.name: _curve(row, seeds, directory) for row in trained}
        for index, (name, (updates, intervals)) in enumerate(lines.items()):
            draw_line(panel, updates, intervals, index=index, label=name.removesuffix(", pre-training"))
        panel.set_xlabel("updates")
        panel.set_ylabel(f"{what}, per cent")
        panel.grid(axis="y", alpha=0.3)
        tables.append(_table(what, lines))
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    write_figure(figure, directory / "accuracy_against_updates.png")
    text = "\n".join(tables)
    write_text(directory / "accuracy_against_updates.md", text)
    return text


def _curve(row: Row, seeds: Sequence[int], directory: Path) -> tuple[list[float], list[Interval]]:
    """The mean number of updates at each point, which differs a little where a sampler decides it, and the mean score.

    Where seeds have different numbers of points, the last of each is kept, and of the others the first.
    """
    curves = [list(read_json(directory / Task(seed, row).record)["curve"].items()) for seed in seeds]
    count = min(map(len, curves))
    points = list(zip(*([*curve[: count - 1], curve[-1]] for curve in curves), strict=True))
    updates = [sum(int(done) for done, _ in point) / len(point) for point in points]
    return updates, [_over_seeds([share for _, share in point]) for point in points]


def _over_seeds(scores: Sequence[float]) -> Interval:
    """The mean and its t-interval; of one seed the score without an interval."""
    if len(scores) == 1:
        return Interval(scores[0], scores[0], scores[0], 0.95, 1, "none")
    return mean_interval(scores, within=(0, 1))


def _table(what: str, lines: Mapping[str, tuple[Sequence[float], Sequence[Interval]]]) -> str:
    """The scores of each row by the share of its updates that were done."""
    count = min(len(intervals) for _, intervals in lines.values())
    done, _ = next(iter(lines.values()))
    heads = " | ".join(f"{100 * updates / done[-1]:.0f} %" for updates in (*done[: count - 1], done[-1]))
    body = []
    for name, (updates, intervals) in lines.items():
        cells = [f"{100 * one.estimate:.1f}" for one in (*intervals[: count - 1], intervals[-1])]
        body.append(f"| {name} | {' | '.join(cells)} | {updates[-1]:.0f} |")
    head = f"| method | {heads} | updates |\n|---|{'---|' * count}---|\n"
    title = f"{what[0].upper()}{what[1:]}, in per cent, by the share of updates that are done:"
    return f"{title}\n\n{head}" + "\n".join(body) + "\n"
