"""Options of the UNITER experiment: frozen dataclasses, their checks, and two presets.

`advvl.experiments.config` reads a field's metadata: `help` (one line for the command line), `flags` (further names of its
flag), `parse` (from the flag's text to the value, where that is not the field's own type), `metavar`, and
`identity=False` for a field that does not change what an output directory holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from advvl.checks import at_least, choice, choices, fraction, not_negative, positive, positive_or_infinite
from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.fit.options import OptimizerOptions

Preset = Literal["demo", "evidence"]
Stage = Literal["pretrain", "finetune", "all"]
Method = Literal["standard", "freelb", "villa"]
Order = Literal["in turn", "together"]
Dropout = Literal["fresh", "shared"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The UNITER that is trained from scratch; a checkpoint has to be of this size.

    Arguments:
        initializer_range: standard deviation of new weights. The published 0.02 is for a width of 768; in a
            narrow model it makes words small, and training slow.
    """

    hidden_size: int = 64
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 192
    dropout: float = 0.0
    initializer_range: float = 0.12

    def __post_init__(self) -> None:
        positive(self, "initializer_range")
        at_least(1, self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"expected hidden_size to be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        fraction(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How many pictures, questions and captions are made of the scanned digits; see `advvl.data`."""

    seed: int = 0
    train_images: int = 300
    train_questions: int = 4000
    validation_questions: int = 1000
    test_questions: int = 2000
    captions: int = 4000

    def __post_init__(self) -> None:
        at_least(0, self, "seed")
        at_least(1, self, "train_images", "train_questions", "validation_questions", "test_questions", "captions")


@dataclass(frozen=True, kw_only=True)
class AdversaryOptions:
    """How an update perturbs the embeddings of words and image regions.

    Arguments:
        steps: K, passes for each modality in turn, or for both together.
        text_step, image_step: L2 length of one ascent step.
        text_radius, image_radius: L2 radius of the ball, per example; infinite: no ball.
        kl_weight: of the symmetric KL divergence between clean and perturbed answers; 0: none.
        clean_weight: of the clean task loss beside the perturbed one.
        dropout: new masks in every pass, or the clean pass's masks in all of them.
    """

    steps: int = 3
    modalities: Order = "in turn"
    text_step: float = 0.05
    image_step: float = 0.2
    text_radius: float = math.inf
    image_radius: float = math.inf
    kl_weight: float = 0.5
    clean_weight: float = 0.5
    dropout: Dropout = "shared"

    def __post_init__(self) -> None:
        at_least(2, self, "steps")
        choice(self, "modalities", Order)
        positive(self, "text_step", "image_step")
        positive_or_infinite(self, "text_radius", "image_radius")
        not_negative(self, "kl_weight", "clean_weight")
        choice(self, "dropout", Dropout)


def own(help: str, **metadata: Any) -> dict[str, Any]:
    """Metadata of a field that belongs to one run and not to what an output directory holds."""
    return {"help": help, "identity": False, **metadata}


def runs(options: Any) -> None:
    """Check what every experiment has to be told: its seeds, threads and jobs, and what becomes of earlier results."""
    if not options.seeds or len(set(options.seeds)) != len(options.seeds) or min(options.seeds) < 0:
        raise ConfigurationError(f"expected seeds to be distinct numbers of 0 or more, got {options.seeds!r}")
    at_least(1, options, "threads", "jobs")
    if options.resume and options.overwrite:
        raise ConfigurationError("expected resume or overwrite, got both; one keeps what the other loses")


def first_seeds(text: str) -> tuple[int, ...]:
    """The seeds 0..N-1 for `text` N, as `--seeds` takes it; ValueError if that is not a whole number of 1 or more."""
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return tuple(range(count))


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """The whole experiment: pre-train, fine-tune by each method from each seed, attack, report."""

    preset: Preset = field(default="demo", metadata=own("values to start from, over the defaults below"))
    stage: Stage = field(default="all", metadata=own("which half of the experiment to run"))
    methods: tuple[Method, ...] = field(
        default=("standard", "freelb", "villa"),
        metadata=own("fine-tuning methods; may be repeated", flags=("--method",)),
    )
    seeds: tuple[int, ...] = field(
        default=(0,), metadata=own("number of seeds, 0 to N-1", parse=first_seeds, metavar="N")
    )
    output: str = field(default="runs/villa_uniter", metadata=own("directory of results"))
    checkpoint: str | None = field(
        default=None, metadata={"help": "UNITER checkpoint to fine-tune instead of pre-training"}
    )
    resume: bool = field(default=False, metadata=own("take up a run where it was killed"))
    overwrite: bool = field(default=False, metadata=own("lose what the output directory holds"))
    jobs: int = field(default=2, metadata=own("processes that share the work, each with its own threads"))
    device: str = field(default="auto", metadata=own("auto, cpu, cuda, cuda:1, ..."))
    threads: int = field(default=1, metadata=own("CPU threads of a process; the same number gives the same bits"))
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    pretrain: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=12))
    finetune: OptimizerOptions = field(default_factory=OptimizerOptions)
    pretrain_adversary: AdversaryOptions = field(default_factory=AdversaryOptions)
    villa: AdversaryOptions = field(default_factory=AdversaryOptions)
    freelb: AdversaryOptions = field(
        default_factory=lambda: AdversaryOptions(modalities="together", kl_weight=0.0, clean_weight=0.0)
    )
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        choice(self, "preset", Preset)
        choice(self, "stage", Stage)
        choices(self, "methods", Method)
        runs(self)
        for name in ("output", "device"):
            if not getattr(self, name):
                raise ConfigurationError(f"expected {name} to be named, got an empty text")


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "demo": {
        "data": {"test_questions": 1000},
        "pretrain": {"epochs": 6},
        "finetune": {"epochs": 8},
        "evaluation": {"restarts": 1, "examples": 200},
    },
    "evidence": {"seeds": (0, 1, 2, 3, 4), "finetune": {"epochs": 50}, "evaluation": {"examples": 500}},
}
