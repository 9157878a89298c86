"""The two stages of VILLA on a corpus in memory: pre-training a UNITER, and fine-tuning a task's head from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from advvl.data.sampling import TokenBuckets
from advvl.data.uniter.sources import CaptionSource, LabelledSource
from advvl.experiments.experiment import Setup, Task, seeded
from advvl.experiments.uniter import ADVERSARIAL_TASKS, Sizes, config_of
from advvl.experiments.uniter_options import VillaOptions
from advvl.models.uniter.checkpoint import load_pretrained
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.pretraining import UniterForPretraining


class Corpus(Sizes, Protocol):
    """A corpus of texts and their images, in three parts."""

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
    tokens: int,
    boxes: Mapping[str, tuple[float, float]] | None = None,
    **head: Any,
) -> Setup:
    """Make a UNITER with pre-training's heads, or the task's model with the encoder of `start`.

    Arguments:
        kind: the class of the task's model; `head` are arguments of it beside the configuration.
        tokens: of words and regions in an update, padding included.
        boxes: bounds of perturbed tensors, by modality.

    Raises:
        CheckpointError: a file to start from that does not fit.
    """
    config = config_of(options.model, corpus)
    if start is None:
        pretrained = seeded(task.seed, UniterForPretraining, config)
        sampler = _buckets(corpus.pretrain, tokens)
        tasks = ADVERSARIAL_TASKS
        return Setup(pretrained, corpus.pretrain, options.pretrain, adversarial_tasks=tasks, sampler=sampler)
    model = seeded(task.seed, kind, config, **head)
    load_pretrained(model, start)
    test = getattr(corpus, options.evaluation.split)
    return Setup(model, corpus.train, options.finetune, test, boxes=boxes, sampler=_buckets(corpus.train, tokens))


def _buckets(source: LabelledSource | CaptionSource, tokens: int) -> TokenBuckets:
    """Put texts of like lengths together: few are long, and a batch of short ones holds several times as many."""
    return TokenBuckets(source.texts.lengths + source.images.lengths[source.image_rows], tokens)
