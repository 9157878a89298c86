"""Options of the experiment on NLVR, and its presets; see `advvl.experiments.options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from advvl.checks import at_least, choice, text
from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.options import own
from advvl.experiments.uniter_options import AdversaryOptions, Method, UniterSize, VillaOptions
from advvl.fit.options import OptimizerOptions

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
    pretrain_adversary: AdversaryOptions = field(default_factory=lambda: AdversaryOptions(steps=2))
    villa: AdversaryOptions = field(default_factory=lambda: AdversaryOptions(steps=2))
    freelb: AdversaryOptions = field(
        default_factory=lambda: AdversaryOptions(steps=2, modalities="together", kl_weight=0.0, clean_weight=0.0)
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
