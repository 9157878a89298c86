"""The ablation of ViLTA, a reconstruction: soft labels, synthesised negatives, both or neither; with and without VILLA.

Each row is a pre-training of its own, then the same fine-tuning, on the digits' questions or on Colors in Context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import torch
from torch import Tensor

from advvl.checks import at_least, check_each, choice, choices, fraction, is_number, is_whole, positive
from advvl.data.colors.corpus import ColorsCorpus
from advvl.data.digits.corpus import DigitsCorpus
from advvl.data.uniter.sources import CaptionSource
from advvl.errors import ConfigurationError
from advvl.experiments import colors, uniter
from advvl.experiments.colors_options import PRESETS as COLORS_PRESETS
from advvl.experiments.colors_options import ColorsOptions
from advvl.experiments.experiment import Experiment, Row, Setup, Task
from advvl.experiments.options import own
from advvl.experiments.uniter_options import PRESETS, Method, UniterOptions, VillaOptions
from advvl.experiments.uniter_rows import training_of, update_cost
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.recipes.vilta import vilta
from advvl.regularizers.references import Averaged
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.soft_labels import LiveText, TextAlone
from advvl.tasks.uniter.synthesised import HardNegatives, check_mismatches, content_words, nearest_images
from advvl.training import AdversarialTraining

Variant = Literal["plain", "soft-labels", "negatives", "both"]
_STAGES: Final[Mapping[Method, str]] = {"standard": "", "both-stages": ", VILLA"}


@dataclass(frozen=True, kw_only=True)
class ViltaSettings:
    """The choices that ViLTA's abstract leaves open.

    Arguments:
        alpha: weight of soft labels in the loss of masked words.
        teacher: of soft labels: a momentum average of the model, or the model on text alone.
        momentum: of that average, per update.
        temperature: of the teacher.
        top_k: words that a soft label keeps; None: all.
        synthesised, similar: shares of mismatches with replaced words, or with an image like the true one.
        words: share of a text's content words that are replaced.
        proposals: most probable words to draw a replacement from.
        threshold: probability above which a word is a synonym and not drawn.
    """

    alpha: float = 0.4
    teacher: Literal["momentum", "live"] = "momentum"
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
        choice(self, "teacher", Literal["momentum", "live"])
        fraction(self, "momentum")
        positive(self, "temperature")
        kept = ("top_k",)
        check_each(self, kept, lambda value: value is None or (is_whole(value) and value > 0), "1 or more, or None")
        check_mismatches(self, "synthesised", "similar", "words", "threshold")
        at_least(1, self, "proposals")


def _variants() -> Any:
    flags = own("pre-trainings to compare; may be repeated", flags=("--variant",))
    return field(default=get_args(Variant), metadata=flags)


def _stages() -> Any:
    flags = own("standard: neither stage perturbed; both-stages: VILLA in both; may be repeated", flags=("--method",))
    return field(default=tuple(_STAGES), metadata=flags)


@dataclass(frozen=True, kw_only=True)
class ViltaOptions(UniterOptions):
    """ViLTA's pre-training on the digits' captions, then visual questions about them."""

    output: str = field(default="runs/vilta", metadata=own("directory of results"))
    methods: tuple[Method, ...] = _stages()
    variants: tuple[Variant, ...] = _variants()
    vilta: ViltaSettings = field(default_factory=ViltaSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ablation(self)


@dataclass(frozen=True, kw_only=True)
class ViltaColorsOptions(ColorsOptions):
    """ViLTA's pre-training on people's words, then which of three colours is meant."""

    output: str = field(default="runs/vilta-colors", metadata=own("directory of results"))
    methods: tuple[Method, ...] = _stages()
    variants: tuple[Variant, ...] = _variants()
    vilta: ViltaSettings = field(default_factory=ViltaSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ablation(self)


def check_ablation(options: ViltaOptions | ViltaColorsOptions) -> None:
    """Raise ConfigurationError unless every row pre-trains, plainly or by VILLA."""
    choices(options, "variants", Variant)
    if not set(options.methods) <= set(_STAGES):
        raise ConfigurationError(
            f"expected methods of {', '.join(_STAGES)}, got {', '.join(options.methods)}; the others have no pre-training "
            "of their own"
        )
    if options.checkpoint is not None:
        raise ConfigurationError("expected no checkpoint, got one, in the place of the pre-training that is compared")


def rows_of(options: VillaOptions) -> list[Row]:
    """Return a pre-training for each variant and stage, and the fine-tuning from each."""
    assert isinstance(options, ViltaOptions | ViltaColorsOptions)
    starts, rows = [], []
    for method in options.methods:
        adversary = options.pretrain_adversary if method == "both-stages" else None
        fine = options.villa if method == "both-stages" else None
        for variant in options.variants:
            start = Row(
                f"{variant}{_STAGES[method]}, pre-training",
                training_of(adversary),
                stage="pretrain",
                file=f"pretrained-{variant}-{method}",
                update_cost=update_cost(adversary),
            )
            starts.append(start)
            name = f"{variant}{_STAGES[method]}"
            rows.append(
                Row(name, training_of(fine), start=start, file=f"{variant}-{method}", update_cost=update_cost(fine))
            )
    return [*(starts if options.stage != "finetune" else []), *(rows if options.stage != "pretrain" else [])]


def set_up(options: ViltaOptions, corpus: DigitsCorpus, task: Task, start: Path | None) -> Setup:
    """Make the setup of the digits' experiment, its pre-training as the row's variant has it."""
    setup = uniter.set_up(options, corpus, task, start)
    return setup if start is not None else _pretraining(setup, options.vilta, task.row, _content(corpus))


def set_up_colors(options: ViltaColorsOptions, corpus: ColorsCorpus, task: Task, start: Path | None) -> Setup:
    """Make the setup of the colours' experiment, its pre-training as the row's variant has it."""
    setup = colors.set_up(options, corpus, task, start)
    return setup if start is not None else _pretraining(setup, options.vilta, task.row, _content(corpus))


def _content(corpus: DigitsCorpus | ColorsCorpus) -> Tensor:
    """The content words among those that captions have."""
    vocabulary = corpus.tokenizer.get_vocab()
    used = torch.bincount(corpus.pretrain.texts.ids.flatten(), minlength=corpus.vocab_size) > 0
    return used & content_words(sorted(vocabulary, key=vocabulary.__getitem__))


def _pretraining(setup: Setup, settings: ViltaSettings, row: Row, content: Tensor) -> Setup:
    variant = str(row.file).split("-", 1)[1]
    model, source = cast(UniterForPretraining, setup.model), cast(CaptionSource, setup.train)
    if variant.startswith(("soft-labels", "both")):
        teacher = LiveText() if settings.teacher == "live" else Averaged(model, settings.momentum)
        words = vilta(
            teacher,
            alpha=settings.alpha,
            temperature=settings.temperature,
            top_k=settings.top_k,
            adversary=row.method,
        )
        methods: dict[str, AdversarialTraining] = {"mlm": words} | ({} if row.method is None else {"itm": row.method})
        setup = replace(setup, method=methods, adversarial_tasks=None)
    if variant.startswith(("negatives", "both")):
        negatives = HardNegatives(
            TextAlone(model),
            content,
            synthesised=settings.synthesised,
            similar=settings.similar,
            words=settings.words,
            top_k=settings.proposals,
            threshold=settings.threshold,
            nearest=nearest_images(source.images) if settings.similar else None,
        )
        setup = replace(setup, train=replace(source, negatives=negatives))
    return setup


def _presets(known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The presets of an experiment with VILLA, with the rows of this one."""
    return {name: {key: value for key, value in preset.items() if key != "methods"} for name, preset in known.items()}


VILTA: Final = Experiment(
    ViltaOptions,
    data=uniter.open_corpus,
    rows=rows_of,
    set_up=set_up,
    presets=_presets(PRESETS),
    prepare=uniter.prepare,
    save=save_checkpoint,
)
VILTA_COLORS: Final = Experiment(
    ViltaColorsOptions,
    data=colors.open_corpus,
    rows=rows_of,
    set_up=set_up_colors,
    presets=_presets(COLORS_PRESETS),
    prepare=colors.prepare,
    save=save_checkpoint,
    conclude=colors.conclude,
)
