"""Options of the experiment on Colors in Context, and its presets; see `advvl.experiments.options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from advvl.checks import at_least, choice, text
from advvl.data.colors.corpus import MOST_TOKENS, REGIONS
from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.options import own
from advvl.experiments.uniter_options import AdversaryOptions, VillaOptions
from advvl.fit.options import OptimizerOptions

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
    pretrain_adversary: AdversaryOptions = field(default_factory=lambda: AdversaryOptions(steps=2, image_step=0.1))
    villa: AdversaryOptions = field(default_factory=lambda: AdversaryOptions(steps=2, image_step=0.1))
    freelb: AdversaryOptions = field(
        default_factory=lambda: AdversaryOptions(
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
