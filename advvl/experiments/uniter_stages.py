"""The stages of the experiment on UNITER: pre-train on captions, fine-tune on questions, attack.

What is finished lies in the output directory as a model file and a record beside it, the record written last, so that a
killed run does again only what has no record, from its last checkpoint:

    OUTPUT/seed-0/pretrained-standard.{safetensors,json}     stage one
    OUTPUT/seed-0/villa.{safetensors,json}                   a row of the table
    OUTPUT/seed-0/*.progress.pt                              a run in progress
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from advvl.adapters.registry import adapt
from advvl.data.digits.corpus import DigitsCorpus
from advvl.errors import CheckpointError, ConfigurationError
from advvl.evaluation.protocol import attacked_scores
from advvl.experiments.options import ExperimentOptions
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.rows import Row, Start, adversary_of, training_of, updates_of
from advvl.experiments.runner import train
from advvl.files import write_json
from advvl.fit.schedules import updates_per_epoch
from advvl.models.uniter.checkpoint import PRETRAINING_HEADS, load_checkpoint, save_checkpoint
from advvl.models.uniter.model import UniterConfig
from advvl.runtime.randomness import derive_seed
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA

ADVERSARIAL_TASKS = ("mlm", "itm")
"""The pre-training tasks that stage one perturbs; regressing masked regions is learnt the plain way (VILLA, §3.2)."""


@dataclass(frozen=True)
class Bench:
    """What every run of one process shares; `worker` is its number among those that share the work."""

    options: ExperimentOptions
    directory: OutputDirectory
    corpus: DigitsCorpus
    accelerator: Accelerator
    progress: bool
    worker: int = 0

    @property
    def shared(self) -> dict[str, Any]:
        """What `train` wants of it."""
        return {"accelerator": self.accelerator, "progress": self.progress, "worker": self.worker}

    def file(self, seed: int, name: str) -> Path:
        return self.directory / f"seed-{seed}" / name


def pretrain(bench: Bench, seed: int, start: Start) -> None:
    """Stage one: a UNITER from scratch on captions, plainly or by VILLA's adversarial pre-training."""
    file = bench.file(seed, f"pretrained-{start}.safetensors")
    record = file.with_suffix(".json")
    if record.exists():
        return
    options = bench.options
    model = _new(bench, UniterForPretraining, seed)
    facts = train(
        model,
        bench.corpus.pretrain,
        **bench.shared,
        options=options.pretrain,
        seed=derive_seed(seed, "pretrain"),
        method=training_of(options.pretrain_adversary) if start == "adversarial" else None,
        adversarial_tasks=ADVERSARIAL_TASKS,
        checkpoint=file.with_suffix(".progress.pt"),
        description=f"seed {seed}, {start} pre-training",
    )
    save_checkpoint(model, file)
    write_json(record, {**facts, "sha256": _sha256(file)})
    file.with_suffix(".progress.pt").unlink(missing_ok=True)


def finetune(bench: Bench, seed: int, row: Row) -> None:
    """Stage two and what comes of it: fine-tune one row's model on questions, and attack it."""
    file = bench.file(seed, f"{row.key}.safetensors")
    record = file.with_suffix(".json")
    if record.exists():
        return
    options, source = bench.options, bench.corpus.train
    start = _start(bench, seed, row)
    model = _new(bench, UniterForVQA, seed, num_answers=len(bench.corpus.answers))
    load_start(model, start, given=row.start == "given")
    updates = options.finetune.epochs * updates_per_epoch(len(source), options.finetune.batch_size)
    facts = train(
        model,
        source,
        **bench.shared,
        options=options.finetune,
        updates=updates_of(row, options, updates),
        seed=derive_seed(seed, "finetune"),
        method=training_of(adversary_of(row, options)),
        checkpoint=file.with_suffix(".progress.pt"),
        description=f"seed {seed}, {row.name}",
    )
    save_checkpoint(model, file)
    began = {"file": start.name, "sha256": _sha256(start)}
    scores = evaluate(bench, model, seed)
    write_json(record, {**facts, "start": began, "sha256": _sha256(file), "scores": scores})
    file.with_suffix(".progress.pt").unlink(missing_ok=True)


def load_start(model: UniterForVQA, path: Path, *, given: bool) -> None:
    """Read stage one's encoder into a model for questions; the head too, if the file has one.

    Errors: `CheckpointError` names what does not fit, and for a `given` file says which would.
    """
    try:
        load_checkpoint(model, path, allow_missing=["vqa_output"], allow_unexpected=PRETRAINING_HEADS)
    except CheckpointError as error:
        if not given:
            raise
        sizes = model.config
        raise CheckpointError(
            f"{error}. This experiment's words and regions are those of its digits: a vocabulary of {sizes.vocab_size}, "
            f"{sizes.max_position_embeddings} positions, features of {sizes.img_dim} numbers (UNITER's published files "
            "have 28996, 512 and 2048). --checkpoint takes files that fit, such as the pretrained-*.safetensors that "
            "this writes, with --model.* set to their sizes"
        ) from error


def evaluate(bench: Bench, model: nn.Module, seed: int) -> dict[str, Any]:
    """The scores of a row's model on the questions that the options choose; see `attacked_scores`."""
    options = bench.options.evaluation
    source = bench.corpus.test if options.split == "test" else bench.corpus.validation
    return attacked_scores(adapt(model), source, options, device=bench.accelerator.device, seed=seed)


def _new(bench: Bench, kind: Callable[..., Any], seed: int, **arguments: Any) -> Any:
    """A model of the options' size, its parameters drawn from the seed."""
    size, corpus = bench.options.model, bench.corpus
    config = UniterConfig(
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
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, kind.__name__))
        return kind(config, **arguments)


def _start(bench: Bench, seed: int, row: Row) -> Path:
    if row.start == "given":
        return Path(bench.options.checkpoint or "")
    path = bench.file(seed, f"pretrained-{row.start}.safetensors")
    record = path.with_suffix(".json")
    if bench.options.stage == "finetune" and not record.exists():
        raise ConfigurationError(
            f"expected {row.start} pre-training of seed {seed} in {str(bench.directory.path)!r}, got none; "
            "run --stage pretrain or --stage all first, or give --checkpoint"
        )
    while not record.exists():  # another worker took it up before this row was taken
        time.sleep(0.1)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
