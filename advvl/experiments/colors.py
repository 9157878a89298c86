"""VILLA on people's words: which of three colours is meant (Colors in Context), in both stages.

Stage one trains a UNITER from scratch on the utterances of training games, plainly or by VILLA's adversarial pre-training;
stage two fine-tunes it, with a score per colour. Perturbed colours stay in [0, 1], so that each can be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from advvl.data.colors.corpus import ColorsCorpus, colors_corpus
from advvl.data.colors.rounds import read_rounds
from advvl.experiments.color_report import INVENTED, condition_table, draw_swatches
from advvl.experiments.colors_options import PRESETS, ColorsOptions
from advvl.experiments.experiment import Experiment, Row, Setup, Task
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.uniter import config_of
from advvl.experiments.uniter_rows import rows_of
from advvl.experiments.villa_stages import stage_of
from advvl.models.uniter.checkpoint import load_checkpoint, save_checkpoint
from advvl.tasks.uniter.referring import UniterForReferringExpressions

BOXES: Final = {"image": (0.0, 1.0)}
"""Bounds of a perturbed colour."""


def prepare(options: ColorsOptions, directory: OutputDirectory) -> None:
    """Find out whether the corpus is there before worker processes are started, and say what was skipped of it.

    Raises:
        DataError: it is not.
    """
    del directory
    found = read_rounds(options.data_dir)
    print(
        f"{len(found.rounds)} rounds of {len({one.game for one in found.rounds})} games; {len(found.skipped)} skipped"
    )


def open_corpus(options: ColorsOptions, directory: OutputDirectory) -> ColorsCorpus:
    """Read the corpus; each process reads it for itself."""
    del directory
    return colors_corpus(options.data_dir)


def set_up(options: ColorsOptions, corpus: ColorsCorpus, task: Task, start: Path | None) -> Setup:
    """Make a UNITER with pre-training's heads, or with one that scores colours and the encoder of `start`."""
    return stage_of(options, corpus, task, start, UniterForReferringExpressions, tokens=options.tokens, boxes=BOXES)


def conclude(options: ColorsOptions, rows: Sequence[Row], directory: OutputDirectory) -> str:
    """Write accuracy by condition beside people's, and draw invented rounds that the attack changes; return the table."""
    corpus = open_corpus(options, directory)
    table = condition_table(rows, options.seeds, directory, corpus.rounds[options.evaluation.split])
    if options.swatches:
        draw_swatches(
            [(row.name, _trained(options, corpus, row, directory)) for row in rows],
            INVENTED,
            corpus.tokenizer,
            directory / "swatches.png",
            radius=sorted(options.evaluation.radii)[len(options.evaluation.radii) // 2],
            steps=options.evaluation.steps,
            count=options.swatches,
        )
    return table


def _trained(
    options: ColorsOptions, corpus: ColorsCorpus, row: Row, directory: OutputDirectory
) -> UniterForReferringExpressions:
    """The first seed's model of a row."""
    model = UniterForReferringExpressions(config_of(options.model, corpus))
    load_checkpoint(model, directory / Task(options.seeds[0], row).weights)
    return model


COLORS: Final = Experiment(
    ColorsOptions,
    data=open_corpus,
    rows=rows_of,
    set_up=set_up,
    presets=PRESETS,
    prepare=prepare,
    save=save_checkpoint,
    conclude=conclude,
)
