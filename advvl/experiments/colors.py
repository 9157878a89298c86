"""VILLA on people's words: which of three colours is meant (Colors in Context), in both stages.

Stage one trains a UNITER from scratch on the utterances of training games, plainly or by VILLA's adversarial pre-training;
stage two fine-tunes it, with a score per colour. Perturbed colours stay in [0, 1], so that each can be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from advvl.checks import at_least, choice, text
from advvl.data.colors.corpus import MOST_TOKENS, REGIONS, ColorsCorpus, colors_corpus
from advvl.data.colors.rounds import read_rounds
from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.color_report import INVENTED, condition_table, draw_swatches
from advvl.experiments.experiment import Experiment, Row, Setup, Task
from advvl.experiments.options import own
from advvl.experiments.villa_options import VillaAdversary, VillaOptions
from advvl.experiments.villa_rows import rows_of
from advvl.experiments.villa_stages import config_of, stage_of
from advvl.fit.options import OptimizerOptions
from advvl.models.uniter.checkpoint import load_checkpoint, save_checkpoint
from advvl.tasks.uniter.referring import UniterForReferringExpressions

Preset = Literal["demo", "evidence"]


@dataclass(frozen=True, kw_only=True)
class ColorsOptions(VillaOptions):
    """Which of three colours do people's words mean? A UNITER with a score per colour, attacked in its colours and words."""

    preset: Preset = field(default="demo", metadata=own("values to start from, over the defaults below"))
    output: str = field(default="runs/colors", metadata=own("directory of results"))
    data_dir: str = field(
        default="", metadata=own("folder or archive of the corpus's CSV files", metavar="PATH", flags=("--data-dir",))
    )
    tokens: int = field(default=1024, metadata={"help": "tokens and colours in an update, padding included"})
    swatches: int = field(default=6, metadata=own("rounds in the picture of colours before and after the attack"))
    finetune: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=8))
    pretrain: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=4))
    pretrain_adversary: VillaAdversary = field(default_factory=lambda: VillaAdversary(steps=2, image_step=0.1))
    villa: VillaAdversary = field(default_factory=lambda: VillaAdversary(steps=2, image_step=0.1))
    freelb: VillaAdversary = field(
        default_factory=lambda: VillaAdversary(
            steps=2, image_step=0.1, modalities="together", kl_weight=0.0, clean_weight=0.0
        )
    )
    evaluation: EvaluationOptions = field(
        default_factory=lambda: EvaluationOptions(radii=(0.05, 0.1, 0.2), text_radii=(0.2, 0.4), examples=600)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "preset", Preset)
        at_least(MOST_TOKENS + REGIONS, self, "tokens")
        at_least(0, self, "swatches")
        if self.data_dir == "":
            raise ConfigurationError(
                "expected --data-dir, the folder or archive of Colors in Context (hawkrobe/reference_games), got none"
            )
        text(self, "data_dir")


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "demo": {
        "methods": ("standard", "villa"),
        "finetune": {"epochs": 3},
        "pretrain": {"epochs": 1},
        "evaluation": {"restarts": 1, "examples": 300},
    },
    "evidence": {"seeds": (0, 1, 2, 3, 4), "evaluation": {"restarts": 1}},
}

BOXES: Final = {"image": (0.0, 1.0)}
"""Bounds of a perturbed colour."""


def prepare(options: ColorsOptions, directory: Path) -> None:
    """Find out whether the corpus is there before worker processes are started, and say what was skipped of it.

    Raises:
        DataError: it is not.
    """
    del directory
    found = read_rounds(options.data_dir)
    print(
        f"{len(found.rounds)} rounds of {len({one.game for one in found.rounds})} games; {len(found.skipped)} skipped"
    )


def open_corpus(options: ColorsOptions, directory: Path) -> ColorsCorpus:
    """Read the corpus; each process reads it for itself."""
    del directory
    return colors_corpus(options.data_dir)


def set_up(options: ColorsOptions, corpus: ColorsCorpus, task: Task, start: Path | None) -> Setup:
    """Make a UNITER with pre-training's heads, or with one that scores colours and the encoder of `start`."""
    return stage_of(options, corpus, task, start, UniterForReferringExpressions, tokens=options.tokens, boxes=BOXES)


def conclude(options: ColorsOptions, rows: Sequence[Row], directory: Path) -> str:
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


def _trained(options: ColorsOptions, corpus: ColorsCorpus, row: Row, directory: Path) -> UniterForReferringExpressions:
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
