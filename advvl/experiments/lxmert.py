"""LXMERT trained on questions about images, the standard way and by LXMERT-AdvTrain, and attacked.

The questions are VQA's, in files that a person gives, or about the digits corpus, which is first written in LXMERT's own
formats, to `OUTPUT/data`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from transformers import LxmertConfig

from advvl.data.digits.as_lxmert import TABLE, TOKENIZER, write_digits
from advvl.data.digits.corpus import DigitsConfig, digits_corpus
from advvl.data.lxmert.answers import read_answers
from advvl.data.lxmert.questions import read_questions
from advvl.data.lxmert.regions import NUM_BOXES, open_regions
from advvl.data.lxmert.sources import Pictures, Sentences, VisualQuestionSource
from advvl.data.wordpiece import load_bert_tokenizer
from advvl.errors import DataError
from advvl.experiments.experiment import Experiment, Row, Setup, Task, seeded
from advvl.experiments.lxmert_options import PRESETS, LxmertAdversary, LxmertOptions
from advvl.fit.bert_adam import BertAdam
from advvl.models.lxmert.checkpoint import load_lxmert_checkpoint, save_lxmert_checkpoint
from advvl.recipes.villa import villa
from advvl.tasks.lxmert.vqa import LxmertForVQA
from advvl.training import AdversarialTraining

Sources = tuple[VisualQuestionSource, VisualQuestionSource]


def prepare(options: LxmertOptions, directory: Path) -> None:
    """Write the digits in LXMERT's formats, unless other files are given or these are there; the tokenizer comes last.

    Raises:
        DataError: a given file is not there.
    """
    for path in (*options.regions, *options.questions, *options.test_questions, options.answers, options.tokenizer):
        if path is not None and not Path(path).exists():
            raise DataError(f"expected a file at {path!r}, got none; check the paths of the data")
    if not options.given_files and not (directory / "data" / TOKENIZER).exists():
        write_digits(digits_corpus(DigitsConfig(**asdict(options.data))), directory / "data")


def open_sources(options: LxmertOptions, directory: Path) -> Sources:
    """Open the given files, or the digits'; return the questions to train on, and to test on.

    Raises:
        DataError: a file that is not what its format says.
    """
    if options.given_files:
        answers, tokenizer = Path(options.answers or ""), Path(options.tokenizer or "")
        return sources_of(options.regions, options.questions, options.test_questions, answers, tokenizer)
    data, split = directory / "data", options.evaluation.split
    regions = [data / f"{part}_obj.tsv" for part in ("train", split)]
    return sources_of(regions, [data / "train.json"], [data / f"{split}.json"], data, data / TOKENIZER, num_boxes=None)


def sources_of(
    regions: Sequence[str | Path],
    questions: Sequence[str | Path],
    test_questions: Sequence[str | Path],
    answers: Path,
    tokenizer: Path,
    *,
    num_boxes: int | None = NUM_BOXES,
) -> Sources:
    """Open questions in LXMERT's formats: those to train on, and those to test on.

    Arguments:
        answers: the folder of the two files of answers.
        num_boxes: as `open_regions` takes it.

    Raises:
        DataError: a file that is not what its format says.
    """
    numbers, listed = TABLE
    table = read_answers(answers / numbers, answers / listed)
    pictures = Pictures([open_regions(path, num_boxes=num_boxes) for path in regions])
    sentences = Sentences(load_bert_tokenizer(tokenizer))
    trained, tested = (
        VisualQuestionSource(
            [question for path in paths for question in read_questions(path)], pictures, table, sentences
        )
        for paths in (questions, test_questions)
    )
    return trained, tested


def rows_of(options: LxmertOptions) -> list[Row]:
    """Return a row for each of the chosen methods, the standard one first."""
    start = None if options.checkpoint is None else Path(options.checkpoint)
    methods = {"standard": None, "lxmert-adv": method_of(options.adversary)}
    return [
        Row(name, method, start=start, update_cost=1 if method is None else options.adversary.steps)
        for name, method in methods.items()
        if name in options.methods
    ]


def set_up(options: LxmertOptions, sources: Sources, task: Task, start: Path | None) -> Setup:
    """Make an LXMERT for these questions, with the encoder of `start` if there is one."""
    train, test = sources
    model = new_model(options, train, task.seed, start)
    optimizer = bert_adam(options) if options.optimizer == "bert-adam" else None
    return Setup(model, train, options.finetune, test, optimizer)


def new_model(options: LxmertOptions, source: VisualQuestionSource, seed: int, start: Path | None) -> LxmertForVQA:
    """Make an LXMERT of the options' size for these questions: drawn from the seed, its encoder that of the file `start`.

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
    model = seeded(seed, LxmertForVQA, config)
    if start is not None:
        load_lxmert_checkpoint(model, start, encoder_only=True)
    return model


def method_of(adversary: LxmertAdversary) -> AdversarialTraining:
    """Return LXMERT-AdvTrain with these options; `advvl.recipes.lxmert_adv.lxmert_adv` with the published ones."""
    steps = {"text": adversary.text_step, "image": adversary.image_step}
    return villa(
        step_sizes={modality: step for modality, step in steps.items() if step is not None},
        steps=adversary.steps,
        kl_weight=adversary.kl_weight,
        dropout=adversary.dropout,
    )


def bert_adam(options: LxmertOptions) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    """Return the maker of LXMERT's own optimiser, which decays every parameter."""
    chosen = options.finetune
    return lambda model: BertAdam(
        model.parameters(), chosen.learning_rate, betas=chosen.betas, weight_decay=chosen.weight_decay
    )


LXMERT: Final = Experiment(
    LxmertOptions,
    data=open_sources,
    rows=rows_of,
    set_up=set_up,
    presets=PRESETS,
    prepare=prepare,
    save=save_lxmert_checkpoint,
)
