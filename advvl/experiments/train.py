"""Training of a task of UNITER on databases, which `advvl train` does.

    OUTPUT/configuration.yaml                   whose directory it is
    OUTPUT/checkpoints/update-00000500.pt       the latest ones, and the best by the val databases
    OUTPUT/training-scores.json                 the scores of each evaluation, by updates
    OUTPUT/{model,best}.safetensors             the weights at the end, and the best ones

Several processes: `accelerate launch -m advvl train …`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.data.uniter.datasets.examples import Shard
from advvl.errors import ConfigurationError
from advvl.experiments.config import identity
from advvl.experiments.database_options import PERTURBED
from advvl.experiments.outputs import claimed_by_main
from advvl.experiments.progress import duration
from advvl.experiments.task_scores import evaluate
from advvl.experiments.train_options import TrainOptions
from advvl.experiments.train_setup import (
    accelerator_of,
    check_fit,
    method_of,
    model_of,
    optimizer_of,
    optimizer_options,
    report_skipped,
    training_of,
    val_shards,
)
from advvl.files import read_json, read_torch, write_json
from advvl.fit.checkpoints import Checkpoints
from advvl.fit.loop import fit
from advvl.fit.options import LoopOptions
from advvl.models.uniter.checkpoint import PRETRAINING_HEADS, load_checkpoint, load_pretrained, save_checkpoint
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.pretraining import UniterForPretraining


def train(options: TrainOptions, *, progress: bool = True) -> Path:
    """Train what the options say, and return the file of the weights at the end.

    Arguments:
        progress: show a bar with the time left in a terminal, and elsewhere a line now and then.

    Raises:
        DataError: databases that are missing, broken, or of different tokenisers.
        CheckpointError: a file to start from that is not there or does not fit.
        ConfigurationError: options that do not go together, or not with the number of processes.
        OutputDirectoryError: the output directory is another configuration's, or holds checkpoints without `resume`.
        MissingExtraError: logs are asked for, and TensorBoard is not installed.
    """
    if options.checkpoint is not None:
        raise ConfigurationError(f"expected start=… to train from, got checkpoint={options.checkpoint!r}; rename it")
    accelerator = accelerator_of(options)
    main, processes = accelerator.is_main_process, accelerator.num_processes
    if options.sampling.micro_batches % processes:
        raise ConfigurationError(
            f"expected sampling.micro_batches as a multiple of {processes} processes, got {options.sampling.micro_batches}; "
            "each does as many"
        )
    model = model_of(options)
    training = training_of(options, model)
    shards = val_shards(options)
    check_fit(model, [*training.shards, *shards])
    report_skipped(training.skipped)
    if options.start is not None:
        _begin(model, Path(options.data_dir) / options.start, main=main)
    output = Path(options.output)
    choices = {"resume": options.resume, "overwrite": options.overwrite, "results": "checkpoints"}
    with claimed_by_main(options.output, identity(options), main=main, **choices):
        if options.tensorboard:
            accelerator.init_trackers("logs")
        log = _Log(options, accelerator, shards, lines=progress and main and not sys.stderr.isatty())
        store = Checkpoints(
            directory=output / "checkpoints",
            keep_last=options.keep,
            keep_best=int(bool(shards)),
            evaluate=log.evaluate if shards else None,
            every=options.evaluation.every,
        )
        result = fit(
            model,
            training.source,
            options=optimizer_options(options),
            seed=options.seed,
            updates=options.optimizer.updates,
            sampler=training.sampler,
            method=method_of(options),
            adversarial_tasks=PERTURBED if options.pretraining else None,
            adversarial_from=options.adversary.start if options.adversarial else 0,
            optimizer=partial(optimizer_of, options),
            accelerator=accelerator,
            weighting="micro-batches",
            log=log.update,
            checkpoint=store,
            resume=options.resume,
            loop=LoopOptions(
                accumulate=options.sampling.micro_batches // processes,
                checkpoint_seconds=60 * options.checkpoint_minutes,
                progress=progress and sys.stderr.isatty(),
                description=options.task,
                workers=options.workers,
            ),
        )
        if main:
            _save(model, output, store.best_file() if shards else None)
            print(f"{result.updates} updates in {duration(result.seconds)}; everything is in {output}", flush=True)
        accelerator.end_training()
    return output / "model.safetensors"


def _begin(model: UniterTask, path: Path, *, main: bool) -> None:
    """Read the weights to start from; pre-training may start from those of a BERT, which has no image side and no heads.

    Raises:
        CheckpointError: a file that does not fit.
    """
    if type(model) is not UniterForPretraining:
        load_pretrained(model, path)
        return
    lacking = ["uniter.img_embeddings", *PRETRAINING_HEADS]
    report = load_checkpoint(model, path, allow_missing=lacking, allow_unexpected=["cls.seq_relationship"])
    if main and report.missing:
        print(f"{path}: drawn from the seed, since the file lacks them: {', '.join(report.missing)}", file=sys.stderr)


def _save(model: UniterTask, output: Path, best: Path | None) -> None:
    """Write the weights at the end and, from the checkpoint of the best scores, the best ones; the model keeps its own."""
    save_checkpoint(model, output / "model.safetensors")
    if best is not None:
        last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(read_torch(best)["model"])
        save_checkpoint(model, output / "best.safetensors")
        model.load_state_dict(last)


@dataclass
class _Log:
    """Scores of a run as it goes: printed, written, and handed to TensorBoard.

    Arguments:
        lines: say now and then how far the run is, where there is no bar.
    """

    options: TrainOptions
    accelerator: Accelerator
    shards: Sequence[Shard]
    lines: bool
    done: int = 0
    began: tuple[float, int] | None = None
    scores: dict[str, Any] = field(default_factory=dict)

    def update(self, done: int, loss: float, factor: float) -> None:
        """Take note of an update; in the main process alone."""
        self.done = done
        if self.options.tensorboard:
            self.accelerator.log(
                {"loss": loss, "learning_rate": self.options.optimizer.learning_rate * factor}, step=done
            )
        updates = self.options.optimizer.updates
        now, before = self.began or (time.monotonic(), done)
        self.began = now, before
        if self.lines and done > before and (done % max(updates // 100, 1) == 0 or done == updates):
            left = (time.monotonic() - now) / (done - before) * (updates - done)
            print(
                f"update {done} of {updates}, loss {loss:.3f}, about {duration(left)} left", file=sys.stderr, flush=True
            )

    def evaluate(self, model: nn.Module) -> float:
        """Score the model in every process, and return the score by which the best is kept."""
        assert isinstance(model, UniterTask)
        found = evaluate(model, self.options, self.shards, quick=True)
        if not self.scores:  # the first time
            report_skipped(found.skipped)
        if not found.scores:
            raise ConfigurationError(
                "expected val databases with targets, got none; leave data.val_texts empty to train without scores"
            )
        if self.accelerator.is_main_process:
            path = Path(self.options.output) / "training-scores.json"
            self.scores = {**(read_json(path) if path.exists() else {}), str(self.done): dict(found.scores)}
            write_json(path, self.scores)
            if self.options.tensorboard:
                self.accelerator.log({f"val/{name}": value for name, value in found.scores.items()}, step=self.done)
            named = ", ".join(f"{name} {value:.4f}" for name, value in found.scores.items())
            tqdm.write(f"after {self.done} updates: {named}", file=sys.stderr)
        return found.headline(self.options.task)
