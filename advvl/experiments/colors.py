"""VILLA on people's words: which of three colours is meant (Colors in Context), in both stages.

Stage one trains a UNITER from scratch on the utterances of training games, plainly or by VILLA's adversarial pre-training;
stage two fine-tunes it, with a score per colour. Perturbed colours stay in [0, 1], so that each can be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from advvl.data.colors.corpus import REGIONS, ColorsCorpus, colors_corpus
from advvl.data.colors.rounds import read_rounds
from advvl.data.sampling import TokenBuckets
from advvl.data.uniter.sources import CaptionSource, LabelledSource
from advvl.experiments.color_report import condition_table, draw_swatches
from advvl.experiments.colors_options import PRESETS, ColorsOptions
from advvl.experiments.experiment import Experiment, Row, Setup, Task, seeded
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.uniter import ADVERSARIAL_TASKS, config_of
from advvl.experiments.uniter_rows import rows_of
from advvl.models.uniter.checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from advvl.tasks.uniter.pretraining import UniterForPretraining
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
    config = config_of(options.model, corpus)
    if start is None:
        pretrained = seeded(task.seed, UniterForPretraining, config)
        return Setup(
            pretrained,
            corpus.pretrain,
            options.pretrain,
            adversarial_tasks=ADVERSARIAL_TASKS,
            sampler=_buckets(corpus.pretrain, options.tokens),
        )
    model = seeded(task.seed, UniterForReferringExpressions, config)
    load_pretrained(model, start)
    test = getattr(corpus, options.evaluation.split)
    sampler = _buckets(corpus.train, options.tokens)
    return Setup(model, corpus.train, options.finetune, test, boxes=BOXES, sampler=sampler)


def _buckets(source: LabelledSource | CaptionSource, tokens: int) -> TokenBuckets:
    """Utterances have 2 to 40 tokens, half of them 4 or fewer: batches of like lengths hold four times as many."""
    return TokenBuckets(source.texts.lengths + REGIONS, tokens)


def conclude(options: ColorsOptions, rows: Sequence[Row], directory: OutputDirectory) -> str:
    """Write accuracy by condition beside people's, and draw rounds that the attack changes; return the table."""
    corpus = open_corpus(options, directory)
    table = condition_table(rows, options.seeds, directory, corpus.rounds[options.evaluation.split])
    if options.swatches:
        draw_swatches(
            [(row.name, _trained(options, corpus, row, directory)) for row in rows],
            getattr(corpus, options.evaluation.split),
            directory / "swatches.png",
            radius=max(options.evaluation.radii),
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
