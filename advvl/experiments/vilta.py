"""The ablation of ViLTA, a reconstruction: soft labels, synthesised negatives, both or neither; with and without VILLA.

Each row is a pre-training of its own, then the same fine-tuning, on the digits' questions or on Colors in Context. A BERT
teacher that the run trains is a row too, from which the pre-trainings that it teaches start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from advvl.data.colors.corpus import ColorsCorpus
from advvl.data.digits.corpus import DigitsCorpus
from advvl.data.uniter.sources import CaptionSource
from advvl.experiments.colors import COLORS
from advvl.experiments.convergence import answered, report_convergence, words_guessed
from advvl.experiments.experiment import Experiment, Row, Setup, Task, save_tensors, seeded
from advvl.experiments.uniter import UNITER
from advvl.experiments.villa_options import VillaOptions
from advvl.experiments.villa_rows import training_of, update_cost
from advvl.experiments.villa_stages import config_of
from advvl.experiments.vilta_options import STAGES, AblationOptions, ViltaColorsOptions, ViltaOptions
from advvl.models.state_files import Naming, load_state, read_state
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.recipes.vilta import vilta
from advvl.regularizers.references import Averaged, Frozen, Reference
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.soft_labels import BertTeacher, LiveText, TextAlone
from advvl.tasks.uniter.synthesised import HardNegatives, content_words, nearest_images
from advvl.training import AdversarialTraining

TEACHER: Final = Row("BERT teacher", stage="pretrain", file="teacher")
"""The masked-language model that a run trains on the captions' words, if it is asked for and no folder is given."""


def rows_of(options: VillaOptions) -> list[Row]:
    """Return a pre-training for each variant and stage, the fine-tuning from each, and the teacher if it is trained."""
    assert isinstance(options, AblationOptions)
    teacher = TEACHER if options.vilta.teacher == "bert" and options.vilta.bert is None else None
    starts, rows = [], []
    for method in options.methods:
        adversary = options.pretrain_adversary if method == "both-stages" else None
        fine = options.villa if method == "both-stages" else None
        for variant in options.variants:
            start = Row(
                f"{variant}{STAGES[method]}, pre-training",
                training_of(adversary),
                start=None if variant == "plain" else teacher,
                stage="pretrain",
                file=f"pretrained-{variant}-{method}",
                update_cost=update_cost(adversary),
            )
            starts.append(start)
            name = f"{variant}{STAGES[method]}"
            rows.append(
                Row(name, training_of(fine), start=start, file=f"{variant}-{method}", update_cost=update_cost(fine))
            )
    taught = [teacher] if teacher and any(row.start is teacher for row in starts) else []
    return [*(taught + starts if options.stage != "finetune" else []), *(rows if options.stage != "pretrain" else [])]


def set_up(
    base: Experiment[Any, Any],
    held_out: Callable[[Any], CaptionSource],
    options: AblationOptions,
    corpus: DigitsCorpus | ColorsCorpus,
    task: Task,
    start: Path | None,
) -> Setup:
    """Make the setup of the experiment that the ablation is made on, its pre-training as the row's variant has it.

    Arguments:
        base: that experiment.
        held_out: from the corpus to captions that no training sees.
    """
    setup = base.set_up(options, corpus, task, start if task.row.stage == "finetune" else None)
    return _Stage(options, corpus, held_out(corpus)).of(setup, task, start)


def held_out_captions(corpus: DigitsCorpus) -> CaptionSource:
    """Return the digits' captions that no training sees."""
    return corpus.pretrain_validation


def held_out_words(corpus: ColorsCorpus) -> CaptionSource:
    """Return people's words for colours that no training sees, as captions."""
    held_out = corpus.validation
    return replace(corpus.pretrain, texts=held_out.texts, images=held_out.images, image_rows=held_out.image_rows)


@dataclass(frozen=True)
class _Stage:
    """Turns a stage of an experiment with VILLA into one of the ablation.

    Arguments:
        held_out: captions that no training sees.
    """

    options: AblationOptions
    corpus: DigitsCorpus | ColorsCorpus
    held_out: CaptionSource

    def of(self, setup: Setup, task: Task, start: Path | None) -> Setup:
        """The teacher's, a pre-training's or a fine-tuning's; `start` is the path of the row's start."""
        evaluations = self.options.curve_points
        if task.row.stage == "finetune":
            return replace(setup, evaluate=answered(self.corpus.validation), evaluations=evaluations)
        setup = replace(setup, evaluate=words_guessed(self.held_out), evaluations=evaluations)
        if task.row == TEACHER:
            teacher = seeded(task.seed, _bert, self.options, self.corpus).train().requires_grad_()
            words = replace(cast(CaptionSource, setup.train), tasks=("mlm",))
            return replace(setup, model=teacher, train=words, adversarial_tasks=None)
        return self._pretraining(setup, task.row, start)

    def _pretraining(self, setup: Setup, row: Row, start: Path | None) -> Setup:
        variant, settings = str(row.file).split("-", 1)[1], self.options.vilta
        if variant.startswith("plain"):
            return setup
        model, source = cast(UniterForPretraining, setup.model), cast(CaptionSource, setup.train)
        bert = teacher_of(self.options, self.corpus, start) if settings.teacher == "bert" else None
        if not variant.startswith("negatives"):
            teacher: Reference = LiveText() if settings.teacher == "live" else Averaged(model, settings.momentum)
            words = vilta(
                teacher if bert is None else Frozen(bert),
                alpha=settings.alpha,
                temperature=settings.temperature,
                top_k=settings.top_k,
                adversary=row.method,
            )
            methods: dict[str, AdversarialTraining] = {"mlm": words} | (
                {} if row.method is None else {"itm": row.method}
            )
            setup = replace(setup, method=methods, adversarial_tasks=None)
        if not variant.startswith("soft-labels"):
            negatives = HardNegatives(
                TextAlone(model),
                self._content(),
                teacher=bert,
                synthesised=settings.synthesised,
                similar=settings.similar,
                words=settings.words,
                top_k=settings.proposals,
                threshold=settings.threshold,
                nearest=nearest_images(source.images) if settings.similar else None,
            )
            setup = replace(setup, train=replace(source, negatives=negatives))
        return setup

    def _content(self) -> Tensor:
        """The content words among those that captions have."""
        vocabulary = self.corpus.tokenizer.get_vocab()
        used = torch.bincount(self.corpus.pretrain.texts.ids.flatten(), minlength=self.corpus.vocab_size) > 0
        return used & content_words(sorted(vocabulary, key=vocabulary.__getitem__))


def teacher_of(options: AblationOptions, corpus: DigitsCorpus | ColorsCorpus, trained: Path | None) -> BertTeacher:
    """Return the BERT of the folder that the options name, or else the one that the run has trained.

    Raises:
        CheckpointError: a folder or file that holds no such model.
        ConfigurationError: another vocabulary than the corpus's.
    """
    folder = options.vilta.bert
    if folder is None:
        teacher = seeded(0, _bert, options, corpus)  # the global generators stay as they are
        assert trained is not None
        load_state(teacher, read_state(trained), Naming(str, frozenset()), source=trained)
        return teacher
    found = corpus.tokenizer.get_vocab()
    words = sorted(found, key=found.__getitem__) if Path(folder, "vocab.txt").is_file() else None
    return BertTeacher(folder, vocab_size=corpus.vocab_size, vocab=words)


def _bert(options: AblationOptions, corpus: DigitsCorpus | ColorsCorpus) -> BertTeacher:
    """A BERT of the UNITER's size, for the words of the corpus."""
    return BertTeacher(BertForMaskedLM(config_of(options.model, corpus)), vocab_size=corpus.vocab_size)


def prepare(base: Experiment[Any, Any], options: AblationOptions, directory: Path) -> None:
    """Prepare the experiment that the ablation is made on, and find out whether a given teacher fits.

    Raises:
        CheckpointError, ConfigurationError: as `teacher_of`.
    """
    if base.prepare is not None:
        base.prepare(options, directory)
    if options.vilta.bert is not None:
        teacher_of(options, base.data(options, directory), None)


def save(model: nn.Module, path: Path) -> Path:
    """Write a UNITER under its official names, or the teacher under its own."""
    return save_tensors(model, path) if isinstance(model, BertTeacher) else save_checkpoint(model, path)


def conclude(base: Experiment[Any, Any], options: AblationOptions, rows: Sequence[Row], directory: Path) -> str:
    """Conclude the experiment that the ablation is made on, and write and return accuracy against updates."""
    first = [] if base.conclude is None else [base.conclude(options, rows, directory)]
    curves = report_convergence(
        rows,
        options.seeds,
        directory,
        pretrained="masked words of held-out captions guessed",
        finetuned="validation accuracy",
    )
    return "\n".join([*first, curves])


def ablation_of(
    base: Experiment[Any, Any], options: type[AblationOptions], held_out: Callable[[Any], CaptionSource]
) -> Experiment[Any, Any]:
    """Return the ablation on the data of an experiment with VILLA, with its presets but for their methods."""
    presets = {
        name: {key: value for key, value in preset.items() if key != "methods"}
        for name, preset in (base.presets or {}).items()
    }
    return Experiment(
        options,
        data=base.data,
        rows=rows_of,
        set_up=partial(set_up, base, held_out),
        presets=presets,
        prepare=partial(prepare, base),
        save=save,
        conclude=partial(conclude, base),
    )


VILTA: Final = ablation_of(UNITER, ViltaOptions, held_out_captions)
VILTA_COLORS: Final = ablation_of(COLORS, ViltaColorsOptions, held_out_words)
