"""VILLA on UNITER over the digits corpus: pre-train on captions, fine-tune on questions, attack.

Stage one trains a UNITER from scratch, plainly or by VILLA's adversarial pre-training; stage two fine-tunes from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from advvl.checks import choice
from advvl.data.digits.corpus import DigitsConfig, DigitsCorpus, digits_corpus
from advvl.data.digits.scans import load_digit_images
from advvl.experiments.experiment import Experiment, Setup, Task
from advvl.experiments.options import DataOptions, own
from advvl.experiments.villa_options import VillaOptions
from advvl.experiments.villa_rows import rows_of
from advvl.experiments.villa_stages import stage_of
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.tasks.uniter.vqa import UniterForVQA

Preset = Literal["demo", "evidence"]


@dataclass(frozen=True, kw_only=True)
class UniterOptions(VillaOptions):
    """Visual questions about the digits."""

    preset: Preset = field(default="demo", metadata=own("values to start from, over the defaults below"))
    output: str = field(default="runs/villa_uniter", metadata=own("directory of results"))
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "preset", Preset)


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "demo": {
        "methods": ("standard", "villa"),
        "data": {"train_questions": 2000, "test_questions": 400},
        "pretrain": {"epochs": 3},
        "finetune": {"epochs": 50},
        "evaluation": {"radii": (0.5,), "restarts": 1, "examples": 400},
    },
    "evidence": {"seeds": (0, 1, 2, 3, 4), "finetune": {"epochs": 50}, "evaluation": {"examples": 500}},
}


def prepare(options: UniterOptions, directory: Path) -> None:
    """Find out whether the scans are there before worker processes are started.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    del options, directory
    load_digit_images()


def open_corpus(options: UniterOptions, directory: Path) -> DigitsCorpus:
    """Make the corpus; it is made again in each process, in memory."""
    del directory
    return digits_corpus(DigitsConfig(**asdict(options.data)))


def set_up(options: UniterOptions, corpus: DigitsCorpus, task: Task, start: Path | None) -> Setup:
    """Make a UNITER with pre-training's heads, or with one for questions and the encoder of `start`."""
    return stage_of(options, corpus, task, start, UniterForVQA, num_answers=len(corpus.answers))


UNITER: Final = Experiment(
    UniterOptions,
    data=open_corpus,
    rows=rows_of,
    set_up=set_up,
    presets=PRESETS,
    prepare=prepare,
    save=save_checkpoint,
)
