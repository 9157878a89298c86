"""Accuracy on colours by condition, and a picture of the colours before and after an attack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from advvl.adapters.registry import adapt
from advvl.attacks import Attack
from advvl.data.colors.corpus import pairs_of
from advvl.data.colors.rounds import Condition, Round
from advvl.evaluation.figures import new_figure, write_figure
from advvl.evaluation.statistics import accuracy_interval
from advvl.experiments.experiment import Row, Task
from advvl.files import read_json, write_text
from advvl.maximizers.pgd import PGD
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2


def condition_table(rows: Sequence[Row], seeds: Sequence[int], directory: Path, rounds: Sequence[Round]) -> str:
    """Write `conditions.md`, the clean accuracy by condition, and return it; people's is that of the listeners.

    Arguments:
        rounds: those that the rows were evaluated on, in order.
    """
    conditions: list[Condition | None] = [None, *get_args(Condition)]
    chosen = [[number for number, one in enumerate(rounds) if kind in (None, one.condition)] for kind in conditions]
    lines = [
        "| listener | all | far | split | close |\n|---|---|---|---|---|",
        _line("people", [[one.clicked == one.target for one in rounds]], chosen),
    ]
    for row in rows:
        scores = [read_json(directory / Task(seed, row).record)["scores"]["clean"] for seed in seeds]
        lines.append(_line(row.name, scores, chosen))
    counts = ", ".join(f"{len(numbers)} {kind}" for kind, numbers in zip(conditions, chosen, strict=True) if kind)
    table = f"Accuracy in per cent [95 % interval] by condition; {counts}.\n\n" + "\n".join(lines) + "\n"
    write_text(directory / "conditions.md", table)
    return table


def _line(name: str, by_seed: Sequence[Sequence[float]], chosen: Sequence[Sequence[int]]) -> str:
    """A line of the table: a cell for each choice of rounds."""
    cells = [accuracy_interval([[one[number] for number in numbers] for one in by_seed]) for numbers in chosen]
    return f"| {name} | {' | '.join(one.percent() for one in cells)} |"


def _invented(number: int, utterance: str, *colors: tuple[float, float, float]) -> Round:
    """A round whose first colour is meant; it is put in the place that its number says."""
    target = number % 3
    placed = (*colors[1 : 1 + target], colors[0], *colors[1 + target :])
    return Round(f"invented-{number}", number, "split", utterance, placed, target, target)


INVENTED: Final = tuple(
    _invented(number, *one)
    for number, one in enumerate(
        [
            ("green", (0.2, 0.7, 0.2), (0.55, 0.7, 0.15), (0.5, 0.3, 0.7)),
            ("the darker blue", (0.15, 0.2, 0.6), (0.3, 0.4, 0.85), (0.8, 0.3, 0.5)),
            ("purple", (0.5, 0.2, 0.65), (0.3, 0.3, 0.75), (0.3, 0.65, 0.4)),
            ("pink", (0.95, 0.4, 0.7), (0.9, 0.35, 0.4), (0.4, 0.7, 0.75)),
            ("the grey one", (0.5, 0.5, 0.5), (0.5, 0.4, 0.6), (0.45, 0.6, 0.4)),
            ("bright orange", (1.0, 0.55, 0.1), (0.85, 0.7, 0.2), (0.3, 0.4, 0.6)),
            ("teal", (0.1, 0.55, 0.55), (0.15, 0.65, 0.35), (0.65, 0.25, 0.25)),
            ("yellow", (0.9, 0.85, 0.15), (0.7, 0.8, 0.2), (0.25, 0.3, 0.75)),
            ("red", (0.8, 0.15, 0.15), (0.8, 0.35, 0.15), (0.3, 0.55, 0.3)),
            ("brown", (0.5, 0.35, 0.15), (0.6, 0.5, 0.15), (0.55, 0.2, 0.45)),
            ("sky blue", (0.4, 0.7, 0.95), (0.4, 0.55, 0.85), (0.5, 0.8, 0.5)),
            ("lime green", (0.6, 0.9, 0.1), (0.35, 0.75, 0.3), (0.85, 0.6, 0.3)),
        ]
    )
)
"""Rounds that nobody played."""


def draw_swatches(
    models: Sequence[tuple[str, nn.Module]],
    rounds: Sequence[Round],
    tokenizer: Tokenizer,
    path: Path,
    *,
    radius: float,
    steps: int,
    count: int,
) -> None:
    """Draw the words and three colours of each round before an attack, and the colours after it, for each model, as a PNG.

    Rounds are the first that all models answer rightly and some model no longer does under attack, so that no model is
    favoured. The target has a frame, the colour that the model chooses a dot.

    Arguments:
        models: names, and models of the task.
        rounds: to choose from, such as `INVENTED`, which a picture may show where the corpus may not be published.
        tokenizer: of the models' words.
        radius, steps: of the L2 attack on the colours, which stay in [0, 1].
        count: rounds to show at most.

    Raises:
        MissingExtraError: matplotlib, of the extra `report`, is not installed.
    """
    batch = pairs_of(rounds, tokenizer).batch(range(len(rounds)))
    seen = [_attacked(model, batch, radius, steps) for _, model in models]
    shown = _lost(seen, batch["targets"])[:count]
    columns = [("before", None), *((name, index) for index, (name, _) in enumerate(models))]
    figure = new_figure(figsize=(1.9 * len(columns), 0.85 * max(1, len(shown)) + 0.9))
    panels = figure.subplots(max(1, len(shown)), len(columns), squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for line, number in zip(panels, shown, strict=False):
        for panel, (_, index) in zip(line, columns, strict=True):
            colours = batch["img_feat"][number] if index is None else seen[index][0][number]
            chosen = None if index is None else int(seen[index][2][number])
            _swatches(panel, colours, int(batch["targets"][number]), chosen)
        line[0].text(0.06, 1.04, f"“{rounds[number].utterance}”", va="bottom", fontsize="x-small")
    for panel, (name, _) in zip(panels[0], columns, strict=True):
        panel.text(1.5, 1.6, name, ha="center", va="bottom", fontsize="small")
    figure.suptitle(f"L2 attack of radius {radius:g} on the colours: frame: meant, dot: chosen", fontsize="medium")
    write_figure(figure, path)


def _attacked(model: nn.Module, batch: dict[str, Any], radius: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The perturbed colours `(B, 3, 3)`, and what the model chooses before and after, `(B,)`."""
    target = adapt(model)
    ascent = Ascent(L2(radius), step_size=2.5 * radius / steps, box=(0.0, 1.0))
    result = Attack(EmbeddingPerturber(image=ascent), PGD(steps=steps))(target, batch)
    model.eval()
    with torch.no_grad():
        before = target.logits(target.forward(batch)).argmax(1)
        with target.inject(result.deltas):
            after = target.logits(target.forward(batch)).argmax(1)
    return batch["img_feat"] + result.deltas["image"], before, after


def _lost(seen: Sequence[tuple[Tensor, Tensor, Tensor]], targets: Tensor) -> list[int]:
    """The rounds that all models answer rightly and some model no longer does under attack, in their order."""
    right = torch.stack([before == targets for _, before, _ in seen]).all(0)
    kept = torch.stack([after == targets for *_, after in seen]).all(0)
    lost: list[int] = (right & ~kept).nonzero().flatten().tolist()
    return lost


def _swatches(panel: Any, colours: Tensor, target: int, chosen: int | None) -> None:
    from matplotlib.patches import Rectangle

    for place, colour in enumerate(colours.clamp(0, 1).tolist()):
        meant = place == target
        panel.add_patch(
            Rectangle((place + 0.06, 0.06), 0.88, 0.88, facecolor=colour, edgecolor="black", linewidth=2.5 * meant)
        )
        if place == chosen:
            panel.plot(place + 0.5, -0.18, marker="o", color="black", markersize=4)
    panel.set_xlim(0, 3)
    panel.set_ylim(-0.35, 1.4)
    panel.set_aspect("equal")
