"""The two stages of VILLA on a corpus in memory: pre-training a UNITER, and fine-tuning a task's head from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from advvl.data.sampling import TokenBuckets
from advvl.data.uniter.sources import CaptionSource, LabelledSource
from advvl.errors import CheckpointError
from advvl.experiments.database_options import PERTURBED
from advvl.experiments.experiment import Setup, Task, seeded
from advvl.experiments.villa_options import UniterSize, VillaOptions
from advvl.models.uniter.checkpoint import load_pretrained
from advvl.models.uniter.config import UniterConfig
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.pretraining import UniterForPretraining


class Corpus(Protocol):
    """A corpus of texts and their images, in three parts, with the sizes that a UNITER has to have."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def feature_dim(self) -> int: ...
    @property
    def label_dim(self) -> int: ...
    @property
    def max_text_length(self) -> int: ...
    @property
    def train(self) -> LabelledSource: ...
    @property
    def validation(self) -> LabelledSource: ...
    @property
    def test(self) -> LabelledSource: ...
    @property
    def pretrain(self) -> CaptionSource: ...


def stage_of(
    options: VillaOptions,
    corpus: Corpus,
    task: Task,
    start: Path | None,
    kind: Callable[..., UniterTask],
    *,
    tokens: int | None = None,
    boxes: Mapping[str, tuple[float, float]] | None = None,
    **head: Any,
) -> Setup:
    """Make a UNITER with pre-training's heads, or the task's model with the encoder of `start`.

    Arguments:
        kind: the class of the task's model; `head` are arguments of it beside the configuration.
        tokens: of words and regions in an update, padding included; None: an update has the options' number of examples.
        boxes: bounds of perturbed tensors, by modality.

    Raises:
        CheckpointError: a file to start from that does not fit; if a person gave it, with the sizes that would.
    """
    config = config_of(options.model, corpus)
    if start is None:
        pretrained = seeded(task.seed, UniterForPretraining, config)
        sampler = _buckets(corpus.pretrain, tokens)
        return Setup(pretrained, corpus.pretrain, options.pretrain, adversarial_tasks=PERTURBED, sampler=sampler)
    model = seeded(task.seed, kind, config, **head)
    try:
        load_pretrained(model, start)
    except CheckpointError as error:
        if not isinstance(task.row.start, Path):
            raise
        raise CheckpointError(
            f"{error}; --checkpoint takes pretrained-*.safetensors of this experiment, of {config.vocab_size} words, "
            f"{config.max_position_embeddings} positions and features of {config.img_dim} numbers"
        ) from error
    test = getattr(corpus, options.evaluation.split)
    return Setup(model, corpus.train, options.finetune, test, boxes=boxes, sampler=_buckets(corpus.train, tokens))


def config_of(size: UniterSize, corpus: Corpus) -> UniterConfig:
    """Return the configuration of a UNITER of this size, for the words and regions of the corpus."""
    return UniterConfig(
        vocab_size=corpus.vocab_size,
        img_dim=corpus.feature_dim,
        img_label_dim=corpus.label_dim,
        max_position_embeddings=corpus.max_text_length,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        intermediate_size=size.intermediate_size,
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
        initializer_range=size.initializer_range,
    )


def _buckets(source: LabelledSource | CaptionSource, tokens: int | None) -> TokenBuckets | None:
    """Put texts of like lengths together: few are long, and a batch of short ones holds several times as many."""
    if tokens is None:
        return None
    return TokenBuckets(source.texts.lengths + source.images.lengths[source.image_rows], tokens)
