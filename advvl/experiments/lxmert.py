"""LXMERT trained on questions about images, the standard way and by LXMERT-AdvTrain, and attacked: one table.

The questions are VQA's, in files that a person gives, or about the digits corpus, which is first written in LXMERT's own
formats. Everything lies under one output directory, which belongs to one configuration:

    OUTPUT/configuration.yaml
    OUTPUT/data/…                                       the digits' files
    OUTPUT/seed-0/lxmert-adv.{safetensors,json}         a row of the table; the record is written last
    OUTPUT/seed-0/*.progress.pt                         a run in progress
    OUTPUT/results.{json,md}, accuracy_against_radius.png
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import LxmertConfig

from advvl.adapters.registry import adapt
from advvl.data.digits.as_lxmert import TABLE, TOKENIZER, write_digits
from advvl.data.digits.corpus import DigitsConfig, digits_corpus
from advvl.data.lxmert.answers import read_answers
from advvl.data.lxmert.questions import read_questions
from advvl.data.lxmert.regions import NUM_BOXES, open_regions
from advvl.data.lxmert.sources import Pictures, Sentences, VisualQuestionSource
from advvl.data.wordpiece import load_bert_tokenizer
from advvl.evaluation.protocol import attacked_scores
from advvl.experiments.config import identity
from advvl.experiments.jobs import work_through
from advvl.experiments.lxmert_options import LxmertAdversary, LxmertOptions, Method
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.results import announced, claim, duration, label_of, publish, released_if_empty
from advvl.experiments.runner import accelerator_on, device_of, reproducible, train
from advvl.files import read_json, write_json
from advvl.fit.bert_adam import BertAdam
from advvl.models.lxmert.checkpoint import load_lxmert_checkpoint, save_lxmert_checkpoint
from advvl.recipes.villa import villa
from advvl.runtime.randomness import derive_seed
from advvl.tasks.lxmert.vqa import LxmertForVQA
from advvl.training import AdversarialTraining

BASELINE: Final = "standard"


@dataclass(frozen=True)
class Task:
    """A row of the table, from one seed."""

    seed: int
    method: Method


@dataclass(frozen=True)
class Files:
    """Where the questions are, in LXMERT's formats; `num_boxes` as in `open_regions`."""

    regions: Sequence[str | Path]
    questions: Sequence[str | Path]
    test_questions: Sequence[str | Path]
    answers: Path
    tokenizer: str | Path
    num_boxes: int | None

    def sources(self) -> tuple[VisualQuestionSource, VisualQuestionSource]:
        """The questions to train on, and to test on. Errors: `DataError` where a file is not what its format says."""
        numbers, listed = TABLE
        table = read_answers(self.answers / numbers, self.answers / listed)
        pictures = Pictures([open_regions(path, num_boxes=self.num_boxes) for path in self.regions])
        sentences = Sentences(load_bert_tokenizer(self.tokenizer))
        trained, tested = (
            VisualQuestionSource(
                [question for path in paths for question in read_questions(path)], pictures, table, sentences
            )
            for paths in (self.questions, self.test_questions)
        )
        return trained, tested


def run(options: LxmertOptions, *, progress: bool = True) -> None:
    """Run what the options ask for and is not there yet, then print and write the table.

    Errors: `OutputDirectoryError` as `advvl.experiments.results.claim`; `ConfigurationError` for a device that is not there;
    `DataError` for files that are not what their formats say; `CheckpointError` for a checkpoint that does not fit.
    """
    device_of(options.device)
    with released_if_empty(options):
        directory = claim(options)
        began = time.monotonic()
        prepare(options, directory)
        tasks = [
            Task(seed, method) for seed in options.seeds for method in sorted(options.methods)
        ]  # the long one first
        label = label_of(options.preset, options.seeds)
        print(f"{label}; {len(tasks)} models to train, {options.jobs} at a time, in {directory.path}", flush=True)
        work_through(open_worker, tasks, options, directory, progress, jobs=options.jobs)
        print("\n" + report(options, directory, time.monotonic() - began))
        print(f"this call took {duration(time.monotonic() - began)}; everything is in {directory.path}", flush=True)


def prepare(options: LxmertOptions, directory: OutputDirectory) -> None:
    """Write the digits in LXMERT's formats, unless other files are given or these are there; the tokenizer comes last."""
    if not options.given_files and not (directory / "data" / TOKENIZER).exists():
        write_digits(digits_corpus(DigitsConfig(**asdict(options.data))), directory / "data")


def files_of(options: LxmertOptions, directory: OutputDirectory) -> Files:
    """The given files, or the digits'."""
    if options.given_files:
        answers, tokenizer = Path(options.answers or ""), Path(options.tokenizer or "")
        return Files(options.regions, options.questions, options.test_questions, answers, tokenizer, NUM_BOXES)
    data, split = directory / "data", options.evaluation.split
    regions = [data / f"{part}_obj.tsv" for part in ("train", split)]
    return Files(regions, [data / "train.json"], [data / f"{split}.json"], data, data / TOKENIZER, num_boxes=None)


@contextmanager
def open_worker(
    index: int, options: LxmertOptions, directory: OutputDirectory, progress: bool
) -> Iterator[Callable[[Task], None]]:
    """Open the files and find the device; then a function that does one task after another."""
    with reproducible(threads=options.threads):
        trained, tested = files_of(options, directory).sources()
        accelerator = accelerator_on(options.device)
        terminal = sys.stderr.isatty()

        def handle(task: Task) -> None:
            record = _record(directory, task)
            if record.exists():
                return
            with announced(f"seed {task.seed}, {task.method}", when=progress and not terminal):
                model = new_model(options, trained, task.seed)
                facts = train(
                    model,
                    trained,
                    accelerator=accelerator,
                    progress=progress and terminal,
                    worker=index,
                    options=options.finetune,
                    seed=derive_seed(task.seed, "finetune"),
                    method=method_of(options.adversary) if task.method == "lxmert-adv" else None,
                    optimizer=bert_adam(options) if options.optimizer == "bert-adam" else None,
                    checkpoint=record.with_suffix(".progress.pt"),
                    description=f"seed {task.seed}, {task.method}",
                )
                save_lxmert_checkpoint(model, record.with_suffix(".safetensors"))
                scores = attacked_scores(
                    adapt(model), tested, options.evaluation, device=accelerator.device, seed=task.seed
                )
                write_json(record, {**facts, "start": options.checkpoint, "scores": scores})
                record.with_suffix(".progress.pt").unlink(missing_ok=True)

        yield handle


def new_model(options: LxmertOptions, source: VisualQuestionSource, seed: int) -> LxmertForVQA:
    """An LXMERT of the options' size for these questions: drawn from the seed, its encoder the checkpoint's if there is one.

    Raises:
        CheckpointError: a checkpoint that does not fit.
    """
    size = options.model
    config = LxmertConfig(
        vocab_size=source.sentences.tokenizer.get_vocab_size(),
        visual_feat_dim=source.pictures.feature_dim,
        num_qa_labels=len(source.answers),
        hidden_size=size.hidden_size,
        l_layers=size.l_layers,
        r_layers=size.r_layers,
        x_layers=size.x_layers,
        num_attention_heads=size.num_attention_heads,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.max_position_embeddings,
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
        initializer_range=size.initializer_range,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "LxmertForVQA"))
        model = LxmertForVQA(config)
    if options.checkpoint is not None:
        load_lxmert_checkpoint(model, options.checkpoint, encoder_only=True)
    return model


def method_of(adversary: LxmertAdversary) -> AdversarialTraining:
    """LXMERT-AdvTrain with these options; `advvl.recipes.lxmert_adv.lxmert_adv` with the published ones."""
    steps = {"text": adversary.text_step, "image": adversary.image_step}
    return villa(
        step_sizes={modality: step for modality, step in steps.items() if step is not None},
        steps=adversary.steps,
        kl_weight=adversary.kl_weight,
        dropout=adversary.dropout,
    )


def bert_adam(options: LxmertOptions) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    """LXMERT's own optimiser, which decays every parameter."""
    chosen = options.finetune
    return lambda model: BertAdam(
        model.parameters(), chosen.learning_rate, betas=chosen.betas, weight_decay=chosen.weight_decay
    )


def report(options: LxmertOptions, directory: OutputDirectory, seconds: float) -> str:
    """Write the table, `results.json` and the curve; the table."""
    return publish(
        directory,
        {
            (method, seed): read_json(_record(directory, Task(seed, method)))
            for method in options.methods
            for seed in options.seeds
        },
        baseline=BASELINE if BASELINE in options.methods else options.methods[0],
        label=label_of(options.preset, options.seeds),
        evaluation=options.evaluation,
        document={
            "configuration": json.loads(json.dumps(identity(options)), parse_constant=str),  # an infinite radius
            "threads": options.threads,
            "seconds_of_last_call": seconds,
        },
    )


def _record(directory: OutputDirectory, task: Task) -> Path:
    return directory / f"seed-{task.seed}" / f"{task.method}.json"
