"""The parts of a training on databases, made of its options: the model, the sources, the optimiser and the method."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedDataParallelKwargs  # type: ignore[import-untyped]
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.data.mixing import MixedSampler, MixedSource
from advvl.data.sampling import TokenBuckets
from advvl.data.source import BatchSource, Sampler
from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Examples, Shard, check_shards
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import DRAWN, ReferringSource
from advvl.data.uniter.datasets.retrieval import Pairs, RetrievalSource
from advvl.data.uniter.datasets.vcr import ChoiceSource
from advvl.data.uniter.datasets.vcr_pretraining import VCRPretrainingSource
from advvl.data.uniter.image_db import RegionLimits, open_images
from advvl.data.uniter.text_db import Lengths, open_texts
from advvl.errors import ConfigurationError, DataError, missing_extra
from advvl.experiments.database_options import MIXED, SIZES, ModelOptions
from advvl.experiments.experiment import seeded
from advvl.experiments.progress import counted
from advvl.experiments.train_options import TrainOptions
from advvl.fit.options import OptimizerOptions
from advvl.maximizers.freelb import FreeLB
from advvl.models.uniter.config import UniterConfig
from advvl.models.uniter.task import UniterTask
from advvl.perturbers.starts import Zero
from advvl.recipes.parts import ball_of, perturber_of
from advvl.regularizers.kl import SymmetricKL
from advvl.runtime.processes import process_index
from advvl.tasks.uniter.mining import BothSides, TwoSides
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2
from advvl.tasks.uniter.optimizer import uniter_adamw
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.referring import UniterForReferringExpressions
from advvl.tasks.uniter.retrieval import HardestSource, UniterForRetrieval
from advvl.tasks.uniter.vcr import VCR_WORDS, UniterForVCR, UniterForVCRPretraining
from advvl.tasks.uniter.ve import UniterForVE
from advvl.tasks.uniter.vqa import UniterForVQA
from advvl.training import AdversarialTraining


def sizes_of(options: ModelOptions) -> UniterConfig:
    """Return the configuration of pre-training that the options describe.

    Raises:
        ConfigurationError: a file that is none, or sizes that make no model.
    """
    given = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    given |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), options.dropout)
    given["itm_ot_lambda"] = options.ot_weight
    if options.config is not None:
        return UniterConfig.from_json_file(options.config, **given)
    return UniterConfig.large(**given) if options.size == "large" else UniterConfig.base(**given)


def model_of(options: TrainOptions) -> UniterTask:
    """Make the task's model, its parameters drawn from the seed."""
    chosen, config = options.model, sizes_of(options.model)
    make = partial(seeded, options.seed)
    match options.task:
        case "pretraining":
            return make(UniterForPretraining, config)
        case "vcr-pretraining":
            return make(UniterForVCRPretraining, config)
        case "vqa":
            return make(UniterForVQA, config, num_answers=chosen.answers)
        case "ve":
            return make(UniterForVE, config)
        case "nlvr2":
            return make(UniterForNLVR2, config, variant=chosen.variant)
        case "vcr":
            return make(UniterForVCR, config)
        case "retrieval" | "hard-retrieval":
            return make(UniterForRetrieval, config, margin=chosen.margin)
        case "referring":
            head = {"mlp": chosen.head_layers, "loss": chosen.loss, "margin": chosen.margin}
            return make(UniterForReferringExpressions, config, **head)


def train_shards(options: TrainOptions, *, lengths: Lengths = "") -> list[Shard]:
    """Open the databases to train on; of VCR, `lengths` says for which of its two tasks texts are measured."""
    data = options.data
    return _opened(options, data.train_texts, data.train_images, data.train_drawn, data.max_text, lengths)


def val_shards(options: TrainOptions) -> list[Shard]:
    """Open the databases to score and to predict."""
    data = options.data
    lengths: Lengths = "qar" if options.task.startswith("vcr") else ""
    return _opened(options, data.val_texts, data.val_images, data.val_drawn, None, lengths)


def _opened(
    options: TrainOptions,
    texts: Sequence[str],
    images: Sequence[str],
    drawn: Sequence[str],
    longest: int | None,
    lengths: Lengths,
) -> list[Shard]:
    root, data = Path(options.data_dir), options.data
    words = sizes_of(options.model).vocab_size + VCR_WORDS * options.task.startswith("vcr")
    found = []
    for place, name in enumerate(texts):
        opened = open_texts(root / name, max_length=longest, lengths=lengths, vocabulary=words)
        limits = RegionLimits(num_bb=data.drawn_bb)
        boxes = open_images(root / drawn[place], limits) if drawn else None
        found.append(Shard(opened, open_images(root / images[place], data.limits), boxes))
    return found


def check_fit(model: UniterTask, shards: Sequence[Shard]) -> None:
    """Check that databases are of one tokeniser, and of the model's words and features.

    Raises:
        DataError: they are not.
    """
    check_shards(shards)
    config, meta, images = model.config, shards[0].texts.meta, shards[0].images
    words = config.vocab_size - model.new_words
    if max(meta.words[1] - model.new_words, meta.cls + 1, meta.sep + 1, meta.mask + 1) > words:
        raise DataError(
            f"expected texts of the model's {words} words in {str(shards[0].texts.folder)!r}, got up to {meta.words[1]}; "
            "give model.vocab_size of its tokenizer"
        )
    if images.feature_dim != config.img_dim:
        raise DataError(
            f"expected the model's {config.img_dim} features of a region in {str(images.folder)!r}, got "
            f"{images.feature_dim}; give model.img_dim"
        )


@dataclass(frozen=True)
class Training:
    """The source of training batches, and the databases.

    Arguments:
        sampler: of micro-batches; None: `fit`'s own.
        skipped: reasons why examples were left out, each with its database and key.
    """

    source: BatchSource
    sampler: Sampler | None
    shards: Sequence[Shard]
    skipped: Sequence[str] = ()


def training_of(options: TrainOptions, model: UniterTask) -> Training:
    """Make the source of training batches.

    Raises:
        DataError: databases that are missing, broken, or of different tokenisers.
        ConfigurationError: no database; ratios for other corpora.
    """
    if not options.data.train_texts:
        raise ConfigurationError("expected a database or more in data.train_texts, got none; name one")
    if options.pretraining:
        return _mixed(options, model)
    shards = train_shards(options, lengths="qa" if options.task == "vcr" else "")
    check_fit(model, shards)
    data, sampling = options.data, options.sampling
    if options.task in ("retrieval", "hard-retrieval"):
        pairs = Pairs(shards, skip_bad=data.skip_bad)
        if options.task == "retrieval":
            return Training(RetrievalSource(pairs, sampling.negatives), None, shards, pairs.examples.skipped)
        assert isinstance(model, UniterForRetrieval)
        sides = TwoSides(pairs, sampling.candidates, sampling.published_layout)
        mined = HardestSource(model, sides, sampling.hardest)
        return Training(mined, BothSides(len(mined), sampling.micro_batches), shards, pairs.examples.skipped)
    source: AnswerSource | PairSource | ChoiceSource | ReferringSource
    if options.task in ("vqa", "ve"):
        source = AnswerSource(shards, options.answer_count, skip_bad=data.skip_bad)
    elif options.task == "nlvr2":
        source = PairSource(shards, options.layout, skip_bad=data.skip_bad)
    elif options.task == "vcr":
        source = ChoiceSource(shards, train_shards(options, lengths="qar"), skip_bad=data.skip_bad)
    else:
        source = ReferringSource(shards, names=DRAWN, skip_bad=data.skip_bad)
    sampler = None if sampling.tokens is None else _buckets(options, source.examples)
    return Training(source, sampler, shards, _skipped([(source.examples, sampler)]))


def _mixed(options: TrainOptions, model: UniterTask) -> Training:
    """Each task of each corpus is a source of its own, drawn by its ratio."""
    lengths: Lengths = "qar" if options.task == "vcr-pretraining" else ""
    shards = train_shards(options, lengths=lengths)
    check_fit(model, shards)
    make = VCRPretrainingSource if options.task == "vcr-pretraining" else PretrainingSource
    sources: dict[str, PretrainingSource | VCRPretrainingSource] = {}
    ratios: dict[str, int] = {}
    for number, (corpus, places) in enumerate(options.mixture.named(len(shards)).items()):
        for task in MIXED:
            ratio = options.mixture.ratios(task)[number : number + 1]
            if ratio and ratio[0]:
                name = f"{corpus} {task}"
                own = [shards[place] for place in places]
                sources[name] = make(own, task, skip_bad=options.data.skip_bad)  # type: ignore[arg-type]
                ratios[name] = ratio[0]
    samplers = {name: _buckets(options, source.examples) for name, source in sources.items()}
    skipped = _skipped([(source.examples, samplers[name]) for name, source in sources.items()])
    return Training(MixedSource(sources), MixedSampler(samplers, ratios), shards, skipped)


def _buckets(options: TrainOptions, examples: Examples) -> TokenBuckets:
    sampling = options.sampling
    assert sampling.tokens is not None
    return TokenBuckets(
        examples.lengths,
        sampling.tokens,
        micro_batches=sampling.micro_batches,
        filling=sampling.filling,
        too_long="skip" if options.data.skip_bad else "refuse",
        names=examples.where,
    )


def _skipped(found: Sequence[tuple[Examples, TokenBuckets | None]]) -> list[str]:
    """Return reasons why examples were left out, each once: those of the sources, and those over the budget."""
    reasons: list[str] = []
    for examples, sampler in found:
        over = () if sampler is None else sampler.skipped
        reasons += examples.skipped
        reasons += [
            f"{examples.where(row)}: {examples.lengths[row]} tokens, over the budget of a batch" for row in over
        ]
    return list(dict.fromkeys(reasons))


def report_skipped(skipped: Sequence[str]) -> None:
    """Print the number of examples that were left out and why, to standard error, in the main process alone."""
    if skipped and not process_index():
        listed = [*(f"skipped: {reason}" for reason in skipped), f"skipped: {counted(len(skipped), 'example')}"]
        tqdm.write("\n".join(listed), file=sys.stderr)


def optimizer_options(options: TrainOptions) -> OptimizerOptions:
    """Return what `fit` needs to know of the optimiser; the clip is that of a mean over micro-batches."""
    chosen, sampling = options.optimizer, options.sampling
    return OptimizerOptions(
        epochs=1,
        batch_size=(sampling.batch_size or 1) * sampling.micro_batches,
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        schedule="uniter",
        warmup=chosen.warmup / chosen.updates,
        clip=chosen.clip / chosen.summed,
        betas=chosen.betas,
    )


def optimizer_of(options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """Make UNITER's AdamW; a gradient `summed` times smaller needs an epsilon as much smaller for the same step."""
    chosen = options.optimizer
    return uniter_adamw(
        model,
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        betas=chosen.betas,
        epsilon=chosen.epsilon / chosen.summed,
        head_rate=chosen.head_rate,
    )


def method_of(options: TrainOptions) -> AdversarialTraining | None:
    """Return VILLA as the options describe it; None: standard training."""
    adversary = options.adversary
    if not options.adversarial:
        return None
    steps = {"text": adversary.text_step, "image": adversary.image_step}
    chosen = {str(modality): steps[modality] for modality in adversary.modalities}
    return AdversarialTraining(
        perturber_of(chosen, ball_of(adversary.norm, adversary.max_norm), Zero()),
        FreeLB(adversary.steps, modalities=adversary.order),
        SymmetricKL(adversary.kl_weight) if adversary.kl_weight else None,
        clean_weight=adversary.clean_weight,
        dropout=adversary.dropout,
        nonfinite="keep" if options.precision == "fp16" else "raise",
    )


def accelerator_of(options: TrainOptions) -> Accelerator:
    """Return accelerate's own, as the options ask.

    Raises:
        MissingExtraError: logs are asked for, and TensorBoard is not installed.
        ConfigurationError: a precision that the machine lacks, or another than this process had before.
    """
    if options.tensorboard and find_spec("tensorboard") is None:
        raise missing_extra("tensorboard", "logs")
    heads = [DistributedDataParallelKwargs(find_unused_parameters=True)] if options.pretraining else []
    try:
        return Accelerator(
            cpu=options.device == "cpu",
            mixed_precision=options.precision,
            log_with="tensorboard" if options.tensorboard else None,
            project_dir=options.output,
            kwargs_handlers=heads,
        )
    except ValueError as error:  # accelerate keeps one precision per process
        raise ConfigurationError(
            f"expected a precision that this process can take, got {options.precision}; start another process or change "
            f"--precision ({error})"
        ) from error
