"""Options of the experiments with VILLA on a UNITER: its size, adversaries and rows; see `advvl.experiments.options`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import NoneType
from typing import Literal, get_args

from advvl.checks import at_least, choice, choices, fraction, instance, not_negative, positive, positive_or_infinite
from advvl.errors import ConfigurationError
from advvl.experiments.options import Dropout, ExperimentOptions, check_heads, own
from advvl.fit.options import OptimizerOptions
from advvl.maximizers.base import Order

Part = Literal["pretrain", "finetune", "all"]
Method = Literal[
    "standard",
    "equal-compute",
    "freelb",
    "villa",
    "pre-training",
    "both-stages",
    "pgd",
    "free-at",
    "smart",
    "villa-text",
    "villa-image",
    "villa-together",
    "villa-no-kl",
    "villa-no-clean",
    "villa-more-steps",
    "villa-near",
    "villa-far",
]


@dataclass(frozen=True, kw_only=True)
class UniterSize:
    """The UNITER that is trained from scratch; a checkpoint has to be of this size.

    Arguments:
        hidden_size: width of the hidden states.
        num_hidden_layers: layers of the encoder.
        num_attention_heads: heads of a layer; they divide hidden_size.
        intermediate_size: width inside the feed-forward blocks.
        dropout: probability of dropping a hidden state or an attention weight.
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
        at_least(1, self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        check_heads(self)
        fraction(self, "dropout")
        positive(self, "initializer_range")


@dataclass(frozen=True, kw_only=True)
class VillaAdversary:
    """Perturbations of the embeddings of words and image regions in an update.

    Arguments:
        steps: K, passes for each modality in turn, or for both together.
        modalities: perturb words and regions in turn, or together.
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


@dataclass(frozen=True, kw_only=True)
class VillaOptions(ExperimentOptions):
    """An experiment with VILLA on a UNITER: pre-train, fine-tune by each method from each seed, attack, report."""

    stage: Part = field(default="all", metadata=own("which half of the experiment to run"))
    methods: tuple[Method, ...] = field(
        default=get_args(Method)[:6],
        metadata=own(
            "rows of the table; the first is what others are compared with; may be repeated", flags=("--method",)
        ),
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "UNITER checkpoint to fine-tune instead of pre-training"}
    )
    model: UniterSize = field(default_factory=UniterSize)
    pretrain: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=12))
    pretrain_adversary: VillaAdversary = field(default_factory=VillaAdversary)
    villa: VillaAdversary = field(default_factory=VillaAdversary)
    freelb: VillaAdversary = field(
        default_factory=lambda: VillaAdversary(modalities="together", kl_weight=0.0, clean_weight=0.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "stage", Part)
        choices(self, "methods", Method)
        instance((str, NoneType), self, "checkpoint")
        if self.checkpoint is not None and set(self.methods) <= {"pre-training", "both-stages"}:
            raise ConfigurationError(
                f"expected a method that starts from the checkpoint, got {', '.join(self.methods)}, which start from "
                "pre-training; leave one out"
            )
        if self.checkpoint is not None and self.stage == "pretrain":
            raise ConfigurationError(
                "expected stage finetune or all with a checkpoint, got pretrain, which it replaces; leave one out"
            )
