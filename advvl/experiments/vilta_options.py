"""Options of ViLTA's ablation, on the digits' questions and on Colors in Context; see `advvl.experiments.options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Final, Literal, get_args

from advvl.checks import at_least, check_each, choice, choices, fraction, instance, is_number, is_whole, positive
from advvl.errors import ConfigurationError
from advvl.experiments.colors import ColorsOptions
from advvl.experiments.options import own
from advvl.experiments.uniter import UniterOptions
from advvl.experiments.villa_options import Method, VillaOptions
from advvl.tasks.uniter.synthesised import check_mismatches, check_shares

Variant = Literal["plain", "soft-labels", "negatives", "both"]
Teacher = Literal["momentum", "live", "bert"]
STAGES: Final[Mapping[Method, str]] = {"standard": "", "both-stages": ", VILLA"}
"""The methods whose rows have a pre-training of their own, and what the rows' names have of them."""


@dataclass(frozen=True, kw_only=True)
class ViltaSettings:
    """The choices that ViLTA's abstract leaves open.

    Arguments:
        alpha: weight of soft labels in the loss of masked words.
        teacher: of soft labels: a momentum average of the model, the model on text alone, or a masked-language BERT.
        bert: folder of that BERT, of the corpus's vocabulary; None: the run trains one of the model's size.
        momentum: of the average, per update.
        temperature: of the teacher.
        top_k: words that a soft label keeps; None: all.
        synthesised, similar: shares of mismatches with replaced words, or with an image like the true one.
        words: share of a text's content words that are replaced.
        proposals: most probable words to draw a replacement from.
        threshold: probability above which a word is a synonym and not drawn; the BERT's, if there is one.
    """

    alpha: float = 0.4
    teacher: Teacher = "momentum"
    bert: str | None = None
    momentum: float = 0.995
    temperature: float = 1.0
    top_k: int | None = None
    synthesised: float = 0.5
    similar: float = 0.0
    words: float = 0.2
    proposals: int = 20
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_each(self, ("alpha",), lambda value: is_number(value) and 0 < value <= 1, "a share in (0, 1]")
        choice(self, "teacher", Teacher)
        instance((str, NoneType), self, "bert")
        if self.bert is not None and self.teacher != "bert":
            raise ConfigurationError(f"expected teacher bert with a folder of one, got {self.teacher}; leave one out")
        fraction(self, "momentum")
        positive(self, "temperature")
        kept = ("top_k",)
        check_each(self, kept, lambda value: value is None or (is_whole(value) and value > 0), "1 or more, or None")
        check_mismatches(self, "synthesised", "similar")
        check_shares(self, "words", "threshold")
        at_least(1, self, "proposals")


@dataclass(frozen=True, kw_only=True)
class AblationOptions(VillaOptions):
    """Options of the ablation on any corpus: its rows, and the choices of ViLTA."""

    methods: tuple[Method, ...] = field(
        default=tuple(STAGES),
        metadata=own(
            "standard: neither stage perturbed; both-stages: VILLA in both; may be repeated", flags=("--method",)
        ),
    )
    variants: tuple[Variant, ...] = field(
        default=get_args(Variant), metadata=own("pre-trainings to compare; may be repeated", flags=("--variant",))
    )
    curve_points: int = field(
        default=8, metadata={"help": "evaluations in each training, for accuracy against updates"}
    )
    vilta: ViltaSettings = field(default_factory=ViltaSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(self, "variants", Variant)
        at_least(1, self, "curve_points")
        if not set(self.methods) <= set(STAGES):
            raise ConfigurationError(
                f"expected methods of {', '.join(STAGES)}, got {', '.join(self.methods)}; the others have no pre-training "
                "of their own"
            )
        if self.checkpoint is not None:
            raise ConfigurationError(
                "expected no checkpoint, got one, in the place of the pre-training that is compared"
            )


@dataclass(frozen=True, kw_only=True)
class ViltaOptions(AblationOptions, UniterOptions):
    """ViLTA's pre-training on the digits' captions, then visual questions about them."""

    output: str = field(default="runs/vilta", metadata=own("directory of results"))


@dataclass(frozen=True, kw_only=True)
class ViltaColorsOptions(AblationOptions, ColorsOptions):
    """ViLTA's pre-training on people's words, then which of three colours is meant."""

    output: str = field(default="runs/vilta-colors", metadata=own("directory of results"))
