"""VILLA on UNITER over the digits corpus: pre-train on captions, fine-tune on questions, attack.

Stage one trains a UNITER from scratch, plainly or by VILLA's adversarial pre-training; stage two fine-tunes from it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Final, Protocol

from advvl.data.digits.corpus import DigitsConfig, DigitsCorpus, digits_corpus
from advvl.data.digits.scans import load_digit_images
from advvl.errors import CheckpointError
from advvl.experiments.experiment import Experiment, Setup, Task, seeded
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.uniter_options import PRESETS, UniterOptions, UniterSize
from advvl.experiments.uniter_rows import rows_of
from advvl.models.uniter.checkpoint import PRETRAINING_HEADS, load_checkpoint, save_checkpoint
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA

ADVERSARIAL_TASKS: Final = ("mlm", "itm")
"""The pre-training tasks that stage one perturbs; regressing masked regions is learnt the plain way (VILLA, §3.2)."""


def prepare(options: UniterOptions, directory: OutputDirectory) -> None:
    """Find out whether the scans are there before worker processes are started.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    del options, directory
    load_digit_images()


def open_corpus(options: UniterOptions, directory: OutputDirectory) -> DigitsCorpus:
    """Make the corpus; it is made again in each process, in memory."""
    del directory
    return digits_corpus(DigitsConfig(**asdict(options.data)))


def set_up(options: UniterOptions, corpus: DigitsCorpus, task: Task, start: Path | None) -> Setup:
    """Make a UNITER with pre-training's heads, or with one for questions and the encoder of `start`."""
    config = config_of(options.model, corpus)
    if start is None:
        pretrained = seeded(task.seed, UniterForPretraining, config)
        return Setup(pretrained, corpus.pretrain, options.pretrain, adversarial_tasks=ADVERSARIAL_TASKS)
    model = seeded(task.seed, UniterForVQA, config, num_answers=len(corpus.answers))
    if isinstance(task.row.start, Path):
        load_given(model, start)
    else:
        load_start(model, start)
    return Setup(model, corpus.train, options.finetune, getattr(corpus, options.evaluation.split))


class Sizes(Protocol):
    """The sizes of a corpus that a UNITER has to have."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def feature_dim(self) -> int: ...
    @property
    def label_dim(self) -> int: ...
    @property
    def max_text_length(self) -> int: ...


def config_of(size: UniterSize, corpus: Sizes) -> UniterConfig:
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


def load_start(model: UniterForVQA, path: Path) -> None:
    """Read an encoder into a model for questions; the head too, if the file has one.

    Raises:
        CheckpointError: a file that does not fit.
    """
    load_checkpoint(model, path, allow_missing=["vqa_output"], allow_unexpected=PRETRAINING_HEADS)


def load_given(model: UniterForVQA, path: Path) -> None:
    """As `load_start`, for a file that a person gives.

    Raises:
        CheckpointError: a file that does not fit; it says which would.
    """
    try:
        load_start(model, path)
    except CheckpointError as error:
        sizes = model.config
        raise CheckpointError(
            f"{error}; --checkpoint takes pretrained-*.safetensors of this experiment, of {sizes.vocab_size} words, "
            f"{sizes.max_position_embeddings} positions and features of {sizes.img_dim} numbers"
        ) from error


UNITER: Final = Experiment(
    UniterOptions,
    data=open_corpus,
    rows=rows_of,
    set_up=set_up,
    presets=PRESETS,
    prepare=prepare,
    save=save_checkpoint,
)
