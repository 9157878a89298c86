"""Options of the LXMERT experiment, and its two presets; see `advvl.experiments.options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final, Literal

from advvl.checks import at_least, check_each, choice, choices, fraction, instance, not_negative, positive
from advvl.errors import ConfigurationError
from advvl.experiments.options import DataOptions, Dropout, ExperimentOptions, check_heads, own

Preset = Literal["demo", "published"]
Method = Literal["standard", "lxmert-adv"]
Optimizer = Literal["adamw", "bert-adam"]

_FILES: Final = ("regions", "questions", "test_questions", "answers", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class LxmertSize:
    """The LXMERT that is trained; a checkpoint has to be of this size.

    Arguments:
        hidden_size: width of the hidden states.
        l_layers, r_layers, x_layers: layers of words, of regions, and of both.
        num_attention_heads: heads of a layer; they divide hidden_size.
        intermediate_size: width inside the feed-forward blocks.
        max_position_embeddings: tokens that a text may have.
        dropout: probability of dropping a hidden state or an attention weight.
        initializer_range: standard deviation of new weights; see `advvl.experiments.villa_options.UniterSize`.
    """

    hidden_size: int = 64
    l_layers: int = 1
    r_layers: int = 1
    x_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 192
    max_position_embeddings: int = 20
    dropout: float = 0.0
    initializer_range: float = 0.12

    def __post_init__(self) -> None:
        at_least(1, self, "hidden_size", "x_layers", "num_attention_heads", "intermediate_size")
        at_least(0, self, "l_layers", "r_layers")
        at_least(20, self, "max_position_embeddings")
        check_heads(self)
        fraction(self, "dropout")
        positive(self, "initializer_range")


@dataclass(frozen=True, kw_only=True)
class LxmertAdversary:
    """Perturbations of the word embeddings and, beyond LXMERT-AdvTrain, of the region features in an update.

    Arguments:
        steps: K, passes.
        text_step, image_step: L2 length of one ascent step; None: the modality stays clean.
        kl_weight: of the symmetric KL divergence between clean and perturbed answers.
        dropout: new masks in every pass, as published, or the clean pass's masks in all of them.
    """

    steps: int = 3
    text_step: float | None = 0.02
    image_step: float | None = None
    kl_weight: float = 0.5
    dropout: Dropout = "shared"

    def __post_init__(self) -> None:
        at_least(2, self, "steps")
        given = [name for name in ("text_step", "image_step") if getattr(self, name) is not None]
        if not given:
            raise ConfigurationError("expected text_step or image_step, got neither; nothing would be perturbed")
        positive(self, *given)
        not_negative(self, "kl_weight")
        choice(self, "dropout", Dropout)


@dataclass(frozen=True, kw_only=True)
class LxmertOptions(ExperimentOptions):
    """The whole experiment: train by each method from each seed, attack, report; on the digits, or on files of VQA."""

    preset: Preset = field(default="demo", metadata=own("values to start from, over the defaults below"))
    output: str = field(default="runs/villa_lxmert", metadata=own("directory of results"))
    methods: tuple[Method, ...] = field(
        default=("standard", "lxmert-adv"), metadata=own("ways to train; may be repeated", flags=("--method",))
    )
    regions: tuple[str, ...] = field(default=(), metadata={"help": "region files, such as train2014_obj36.tsv"})
    questions: tuple[str, ...] = field(default=(), metadata={"help": "question files to train on, such as train.json"})
    test_questions: tuple[str, ...] = field(default=(), metadata={"help": "to test on, such as minival.json"})
    answers: str | None = field(
        default=None, metadata={"help": "directory of trainval_ans2label.json and trainval_label2ans.json"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "bert-base-uncased's vocab.txt or tokenizer.json"})
    checkpoint: str | None = field(default=None, metadata={"help": "LXMERT checkpoint whose encoder to begin from"})
    model: LxmertSize = field(default_factory=LxmertSize)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: Optimizer = field(default="adamw", metadata={"help": "bert-adam is LXMERT's own"})
    adversary: LxmertAdversary = field(default_factory=LxmertAdversary)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "preset", Preset)
        choices(self, "methods", Method)
        choice(self, "optimizer", Optimizer)
        instance((str, NoneType), self, "answers", "tokenizer", "checkpoint")
        check_each(self, ("regions", "questions", "test_questions"), _are_texts, "a tuple of file names")
        missing = [name for name in _FILES if not getattr(self, name)]
        if 0 < len(missing) < len(_FILES):
            raise ConfigurationError(
                f"expected all of {', '.join(_FILES)}, or none of them for the digits, got no {', '.join(missing)}"
            )
        if self.given_files and self.evaluation.split != "test":
            raise ConfigurationError(
                f"expected evaluation.split to be test, which is test_questions, got {self.evaluation.split!r}"
            )

    @property
    def given_files(self) -> bool:
        """True for files that a person gave, False for the digits."""
        return bool(self.regions)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "demo": {
        "data": {"train_questions": 4000, "test_questions": 1000},
        "finetune": {"epochs": 14},
        "evaluation": {"restarts": 1, "examples": 200},
    },
    "published": {
        "model": {
            "hidden_size": 768,
            "l_layers": 9,
            "r_layers": 5,
            "x_layers": 5,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
            "dropout": 0.1,
            "initializer_range": 0.02,
        },
        "optimizer": "bert-adam",
        "finetune": {
            "epochs": 4,
            "batch_size": 32,
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "schedule": "warmup-linear",
            "warmup": 0.1,
            "clip": 5.0,
            "betas": (0.9, 0.999),
        },
        "adversary": {"text_step": 1e-3, "kl_weight": 1.5, "dropout": "fresh"},
        "evaluation": {"restarts": 1, "examples": 500},
    },
}
