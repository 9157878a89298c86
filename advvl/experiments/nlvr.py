"""VILLA on people's statements: is it true of three boxes of objects (NLVR), in both stages.

Stage one trains a UNITER from scratch on the true statements and their boxes, plainly or by VILLA's adversarial
pre-training; stage two fine-tunes it, with a score for true and one for false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from advvl.checks import at_least, choice, path_of, text
from advvl.data.nlvr.corpus import NlvrCorpus, nlvr_corpus
from advvl.data.nlvr.statements import read_statements
from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.experiment import Experiment, Setup, Task
from advvl.experiments.options import own
from advvl.experiments.villa_options import Method, UniterSize, VillaAdversary, VillaOptions
from advvl.experiments.villa_rows import rows_of
from advvl.experiments.villa_stages import stage_of
from advvl.fit.options import OptimizerOptions
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.tasks.uniter.vqa import UniterForVQA

Preset = Literal["demo", "evidence"]
Fold = Literal["0", "1", "2", "3", "4", "5"]


@dataclass(frozen=True, kw_only=True)
class NlvrOptions(VillaOptions):
    """Is a statement about three boxes of objects true? A UNITER that judges it, attacked in the objects and the words."""

    preset: Preset = field(default="demo", metadata=own("values to start from, over the defaults below"))
    output: str = field(default="runs/nlvr", metadata=own("directory of results"))
    data_dir: str = field(
        default="", metadata=own("folder of dev.json and test.json", metavar="PATH", flags=("--data-dir",))
    )
    tokens: int = field(default=2048, metadata={"help": "tokens and objects in an update, padding included"})
    copies: int = field(default=24, metadata={"help": "permutations of each statement to learn, itself among them"})
    fold: Fold = field(default="5", metadata={"help": "of dev.json, the statements that are not learnt: validation"})
    model: UniterSize = field(default_factory=lambda: UniterSize(dropout=0.1))
    finetune: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=6))
    pretrain: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=4))
    pretrain_adversary: VillaAdversary = field(default_factory=lambda: VillaAdversary(steps=2))
    villa: VillaAdversary = field(default_factory=lambda: VillaAdversary(steps=2))
    freelb: VillaAdversary = field(
        default_factory=lambda: VillaAdversary(steps=2, modalities="together", kl_weight=0.0, clean_weight=0.0)
    )
    evaluation: EvaluationOptions = field(
        default_factory=lambda: EvaluationOptions(radii=(0.2, 0.5), text_radii=(0.2, 0.4), examples=990)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "preset", Preset)
        choice(self, "fold", Fold)
        at_least(128, self, "tokens")
        at_least(1, self, "copies")
        if self.data_dir == "":
            raise ConfigurationError(
                "expected --data-dir, the folder of NLVR's dev.json and test.json (lil-lab/nlvr), got none"
            )
        text(self, "data_dir")


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "demo": {
        "methods": ("standard", "villa"),
        "copies": 4,
        "finetune": {"epochs": 2},
        "pretrain": {"epochs": 1},
        "evaluation": {"restarts": 1, "examples": 300},
    },
    "evidence": {"seeds": (0, 1, 2), "methods": get_args(Method)},
}

ANSWERS: Final = 2
"""False and true."""

CORPUS_SEED: Final = 0
"""Of the permutations of statements: every seed of the experiment has the same corpus."""


def prepare(options: NlvrOptions, directory: Path) -> None:
    """Find out whether the corpus is there before worker processes are started, and say how large it is.

    Raises:
        DataError: it is not, or is malformed.
    """
    del directory
    for name in ("dev.json", "test.json"):
        found = read_statements(path_of(options.data_dir) / name)
        true = sum(one.label is True for one in found)
        print(
            f"{name}: {len(found)} statements, {100 * max(true, len(found) - true) / len(found):.1f} % in the larger class"
        )


def open_corpus(options: NlvrOptions, directory: Path) -> NlvrCorpus:
    """Read the corpus; each process reads it for itself."""
    del directory
    return nlvr_corpus(options.data_dir, copies=options.copies, fold=options.fold, seed=CORPUS_SEED)


def set_up(options: NlvrOptions, corpus: NlvrCorpus, task: Task, start: Path | None) -> Setup:
    """Make a UNITER with pre-training's heads, or with one that judges statements and the encoder of `start`."""
    return stage_of(options, corpus, task, start, UniterForVQA, tokens=options.tokens, num_answers=ANSWERS)


NLVR: Final = Experiment(
    NlvrOptions,
    data=open_corpus,
    rows=rows_of,
    set_up=set_up,
    presets=PRESETS,
    prepare=prepare,
    save=save_checkpoint,
)
