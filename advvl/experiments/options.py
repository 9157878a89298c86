"""What the UNITER experiment can be told: frozen dataclasses, their checks, and two presets.

A field's metadata is read by `advvl.config`: `help` (one line for the command line), `flags` (further names of its
flag), `parse` (from the flag's text to the value, where that is not the field's own type), `metavar`, and
`identity=False` for a field that does not change what an output directory holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from advvl.errors import ConfigurationError

Preset = Literal["demo", "evidence"]
Stage = Literal["pretrain", "finetune", "all"]
Method = Literal["standard", "freelb", "villa"]
Schedule = Literal["one-cycle", "linear", "warmup-linear"]
Order = Literal["in turn", "together"]
Dropout = Literal["fresh", "shared"]
Objective = Literal["cross-entropy", "margin"]
Split = Literal["test", "validation"]


def _check(options: object, names: tuple[str, ...], good: Callable[[Any], bool], wanted: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not good(value):
            raise ConfigurationError(f"expected {name} to be {wanted}, got {value!r}")


def at_least(least: int, options: object, *names: str) -> None:
    """Each of these functions raises `ConfigurationError` unless the named options are what its name says."""
    _check(
        options,
        names,
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"a whole number of {least} or more",
    )


def positive(options: object, *names: str) -> None:
    _check(options, names, lambda value: 0 < value < math.inf, "a finite number above 0")


def _positive_or_infinite(options: object, *names: str) -> None:
    _check(options, names, lambda value: value > 0, "a number above 0, or math.inf (.inf in YAML) for no limit")


def not_negative(options: object, *names: str) -> None:
    _check(options, names, lambda value: 0 <= value < math.inf, "a finite number of 0 or more")


def fraction(options: object, *names: str) -> None:
    _check(options, names, lambda value: 0 <= value < 1, "a number in [0, 1)")


def choice(options: object, name: str, literal: Any) -> None:
    _check(options, (name,), lambda value: value in get_args(literal), f"one of {', '.join(get_args(literal))}")


def choices(options: object, name: str, literal: Any) -> None:
    _check(
        options,
        (name,),
        lambda values: len(values) > 0 and len(set(values)) == len(values) and set(values) <= set(get_args(literal)),
        f"one or more of {', '.join(get_args(literal))}, each once",
    )


def _radii(options: object, *names: str) -> None:
    _check(
        options,
        names,
        lambda radii: all(0 < r < math.inf for r in radii) and list(radii) == sorted(set(radii)),
        "finite numbers above 0, each larger than the one before",
    )


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
class OptimizerOptions:
    """AdamW, its schedule over all updates, and the gradient's clipping.

    Arguments:
        warmup: fraction of the updates in which the rate rises.
        clip: largest L2 norm of the whole gradient; infinite: none.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: Schedule = "one-cycle"
    warmup: float = 0.1
    clip: float = 2.0
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size")
        positive(self, "learning_rate")
        not_negative(self, "weight_decay")
        choice(self, "schedule", Schedule)
        fraction(self, "warmup")
        _positive_or_infinite(self, "clip")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(f"expected betas to be two numbers in [0, 1), got {self.betas!r}")


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
        _positive_or_infinite(self, "text_radius", "image_radius")
        not_negative(self, "kl_weight", "clean_weight")
        choice(self, "dropout", Dropout)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The attacks that measure robustness: L2 PGD on one modality at a time, the worst of all restarts and objectives.

    Arguments:
        radii, text_radii: L2 radii, per example, around the image features and the word embeddings.
        step_fraction: the ascent's step size as a fraction of the radius.
        examples: how many questions are attacked; None: all of them.
        split: the questions to evaluate on; hyper-parameters are chosen on the validation ones.
    """

    radii: tuple[float, ...] = (0.25, 0.5, 1.0)
    text_radii: tuple[float, ...] = (0.5,)
    steps: int = 20
    step_fraction: float = 0.125
    restarts: int = 3
    objectives: tuple[Objective, ...] = ("cross-entropy", "margin")
    examples: int | None = None
    split: Split = "test"
    batch_size: int = 200

    def __post_init__(self) -> None:
        _radii(self, "radii", "text_radii")
        at_least(1, self, "steps", "restarts", "batch_size")
        positive(self, "step_fraction")
        choices(self, "objectives", Objective)
        choice(self, "split", Split)
        if self.examples is not None:
            at_least(1, self, "examples")


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
