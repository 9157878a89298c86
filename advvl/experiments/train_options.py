"""Options of `advvl train`, `advvl evaluate` and `advvl predict`: a task of UNITER on databases, standard or adversarial.

`examples/configs/uniter/` holds one file for each released configuration of UNITER and VILLA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args

from advvl.checks import (
    at_least,
    check_each,
    choice,
    flag,
    fractions,
    instance,
    is_number,
    not_negative,
    positive,
    positive_or_infinite,
    text,
)
from advvl.data.sampling import Filling
from advvl.data.uniter.datasets.answers import VE_LABELS
from advvl.data.uniter.datasets.nlvr2 import Layout
from advvl.errors import ConfigurationError
from advvl.experiments.database_options import MIXED, DatabaseOptions, MixtureOptions, ModelOptions, are_names
from advvl.experiments.options import Dropout, own
from advvl.maximizers.base import Order
from advvl.ops import Norm

TaskName = Literal[
    "pretraining", "vcr-pretraining", "vqa", "ve", "nlvr2", "vcr", "retrieval", "hard-retrieval", "referring"
]
Modality = Literal["text", "image"]
Precision = Literal["no", "bf16", "fp16"]
Device = Literal["auto", "cpu"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The micro-batches of an update, over all processes.

    Arguments:
        tokens: budget of a micro-batch, of words and regions with padding; this or batch_size.
        batch_size: examples of a micro-batch; this or tokens.
        micro_batches: of an update. Published configurations say how many each of so many GPUs has: it is their product.
        filling: how a budget is filled; "uniter" leaves nearly half of it empty, as published.
        negatives: of retrieval, mismatched images of a text, and as many texts of an image.
        candidates, hardest: of hard-retrieval, mismatches of a match, and how many of them are learnt from.
        published_layout: of hard-retrieval, lay out the texts of an image by the length of the last one, as published: where
            others are longer, regions are left out.
    """

    tokens: int | None = None
    batch_size: int | None = None
    micro_batches: int = 1
    filling: Filling = "full"
    negatives: int = 1
    candidates: int = 399
    hardest: int = 31
    published_layout: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("tokens", "batch_size") if getattr(self, name) is not None]
        at_least(1, self, "micro_batches", "negatives", "candidates", "hardest", *given)
        choice(self, "filling", Filling)
        flag(self, "published_layout")


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """UNITER's AdamW, the schedule of its rate, and the gradient's clipping.

    Arguments:
        updates: how many.
        learning_rate: the highest of the schedule, which rises and falls along straight lines.
        warmup: updates in which it rises.
        head_rate: factor of the rate of what pre-training does not have, the task's head.
        weight_decay: of parameters whose name has neither "bias" nor "LayerNorm.weight" in it, as published.
        betas, epsilon: of AdamW.
        clip: largest L2 norm of the whole gradient; infinite: none.
        summed: times that the published gradient is the mean of the micro-batches' that is taken here: the published
            code adds up what a GPU accumulates. Clip and epsilon are those of the sum.
    """

    updates: int = 6000
    learning_rate: float = 5e-5
    warmup: int = 600
    head_rate: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    clip: float = 2.0
    summed: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "updates", "summed")
        at_least(0, self, "warmup")
        positive(self, "learning_rate", "head_rate", "epsilon")
        not_negative(self, "weight_decay")
        positive_or_infinite(self, "clip")
        fractions(2, self, "betas")
        if self.warmup >= self.updates:
            raise ConfigurationError(f"expected warmup below updates = {self.updates}, got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class AdversaryOptions:
    """VILLA's adversary; without a modality, training is standard.

    Arguments:
        modalities: of text, image.
        order: perturb the modalities together, or in turn.
        text_step, image_step: length of one ascent step, in the norm.
        steps: K, passes for each modality in turn, or for both together.
        norm: of steps and of the ball.
        max_norm: radius of the ball, per example; infinite: no ball (published files say 0).
        kl_weight: of the symmetric KL divergence between clean and perturbed predictions; 0: none.
        clean_weight: of the clean task loss beside the perturbed one.
        dropout: new masks in every pass, or the clean pass's masks in all of them.
        start: plain updates before the first adversarial one.
    """

    modalities: tuple[Modality, ...] = ()
    order: Order = "together"
    text_step: float = 1e-3
    image_step: float = 1e-3
    steps: int = 3
    norm: Norm = "l2"
    max_norm: float = math.inf
    kl_weight: float = 1.5
    clean_weight: float = 0.0
    dropout: Dropout = "fresh"
    start: int = 0

    def __post_init__(self) -> None:
        if self.modalities:
            check_each(self, ("modalities",), _are_modalities, "a list of text, image, none of them twice")
        choice(self, "order", Order)
        choice(self, "norm", Norm)
        choice(self, "dropout", Dropout)
        at_least(2, self, "steps")
        at_least(0, self, "start")
        positive(self, "text_step", "image_step")
        positive_or_infinite(self, "max_norm")
        not_negative(self, "kl_weight", "clean_weight")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Scores on the val databases, during training and after it.

    Arguments:
        every: updates between evaluations; one more comes after the last update.
        tokens: budget of a batch.
        images: of retrieval during training, the first so many images with their texts; `advvl evaluate` takes all.
        published_recall: of retrieval, `advvl evaluate` counts image recall as the published script does: it may pass 1.
    """

    every: int = 500
    tokens: int = 10240
    images: int = 100
    published_recall: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "every", "tokens", "images")
        flag(self, "published_recall")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """A task of UNITER, its databases, and its training.

    Raises:
        ConfigurationError: a value of another type or out of its range; options that do not go together.
    """

    task: TaskName = field(default="vqa", metadata={"help": "what to train"})
    seed: int = field(default=42, metadata={"help": "everything random follows from it"})
    start: str | None = field(
        default=None, metadata={"help": "checkpoint of pre-training to start from, under the data directory"}
    )
    checkpoint: str | None = field(
        default=None,
        metadata=own("weights to evaluate or to predict by; none: the best of the output directory", metavar="FILE"),
    )
    data_dir: str = field(default=".", metadata=own("directory of databases and checkpoints", flags=("--data-dir",)))
    output: str = field(default="runs/train", metadata=own("directory of checkpoints, logs and results"))
    resume: bool = field(default=False, metadata=own("take up a run where it was killed"))
    overwrite: bool = field(default=False, metadata=own("lose what the output directory holds"))
    device: Device = field(default="auto", metadata=own("auto, or cpu even where there is a GPU"))
    precision: Precision = field(default="no", metadata={"help": "mixed precision of the model's passes"})
    workers: int = field(default=0, metadata=own("processes that read batches ahead, for each process of the run"))
    keep: int = field(default=2, metadata=own("latest checkpoints to keep, beside the best one"))
    checkpoint_minutes: float = field(default=10.0, metadata=own("minutes between checkpoints"))
    tensorboard: bool = field(default=False, metadata=own("write logs for TensorBoard, of the extra `logs`"))
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DatabaseOptions = field(default_factory=DatabaseOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    optimizer: UpdateOptions = field(default_factory=UpdateOptions)
    adversary: AdversaryOptions = field(default_factory=AdversaryOptions)
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    evaluation: ScoringOptions = field(default_factory=ScoringOptions)

    def __post_init__(self) -> None:
        choice(self, "task", TaskName)
        choice(self, "device", Device)
        choice(self, "precision", Precision)
        at_least(0, self, "seed", "workers")
        at_least(1, self, "keep")
        instance((str, NoneType), self, "start", "checkpoint")
        text(self, "data_dir", "output")
        flag(self, "resume", "overwrite", "tensorboard")
        check_each(self, ("checkpoint_minutes",), lambda v: is_number(v) and v >= 0, "a number of 0 or more")
        if self.resume and self.overwrite:
            raise ConfigurationError("expected resume or overwrite, got both; one keeps what the other loses")
        for problem in self._misfits():
            raise ConfigurationError(problem)

    @property
    def adversarial(self) -> bool:
        """True if an update is perturbed."""
        return bool(self.adversary.modalities)

    @property
    def pretraining(self) -> bool:
        """True for tasks that are mixed."""
        return self.task in ("pretraining", "vcr-pretraining")

    @property
    def answer_count(self) -> int:
        """The number of answers of VQA or of visual entailment."""
        return len(VE_LABELS) if self.task == "ve" else self.model.answers

    @property
    def layout(self) -> Layout:
        """The rows of a sentence with two images, as NLVR2's head takes them."""
        return "triplet" if self.model.variant == "triplet" else "paired"

    def _misfits(self) -> Iterator[str]:
        """Say what does not go together."""
        tokens, rows = self.sampling.tokens, self.sampling.batch_size
        if self.task == "hard-retrieval":
            if self.workers:
                yield f"expected workers = 0 for hard-retrieval, whose mismatches the model chooses, got {self.workers}"
            if tokens is not None or rows is not None or self.sampling.micro_batches % 2:
                yield (
                    "expected an even number of micro_batches and no tokens or batch_size for hard-retrieval, got "
                    f"{self.sampling}; each match has two"
                )
            if self.sampling.hardest >= self.sampling.candidates:
                yield f"expected hardest below candidates = {self.sampling.candidates}, got {self.sampling.hardest}"
        elif (tokens is None) == (rows is None):
            yield f"expected sampling.tokens or sampling.batch_size, got {tokens} and {rows}; give one of them"
        elif (self.task == "retrieval" or self.pretraining) and (tokens is None) == self.pretraining:
            yield f"expected sampling.{'tokens' if tokens is None else 'batch_size'} for {self.task}, got the other"
        if self.pretraining and not any(map(sum, map(self.mixture.ratios, MIXED))):
            yield "expected a ratio of 1 or more for one task of mixture, got none; give mlm, say"


def _are_modalities(value: Any) -> bool:
    return are_names(value) and len(set(value)) == len(value) and set(value) <= set(get_args(Modality))
