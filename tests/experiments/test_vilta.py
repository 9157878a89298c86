"""The ablation of ViLTA: which rows it has, what each one's pre-training is, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from advvl import Averaged, Frozen
from advvl.data.digits.corpus import DigitsCorpus
from advvl.errors import CheckpointError, ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.convergence import report_convergence
from advvl.experiments.experiment import Row, Setup, Task
from advvl.experiments.options import DataOptions
from advvl.experiments.outputs import claim
from advvl.experiments.runner import run
from advvl.experiments.uniter import UNITER
from advvl.experiments.vilta import TEACHER, VILTA, rows_of
from advvl.experiments.vilta_options import ViltaOptions, ViltaSettings
from advvl.files import write_json
from advvl.fit.options import OptimizerOptions
from advvl.models.state_files import read_state
from advvl.tasks.uniter.soft_labels import BertTeacher, LiveText
from advvl.tasks.uniter.synthesised import HardNegatives

SMALL = DataOptions(train_questions=40, test_questions=20, captions=40)


@pytest.fixture(scope="module")
def corpus() -> DigitsCorpus:
    return UNITER.data(ViltaOptions(data=SMALL), None)  # type: ignore[arg-type]


def made(corpus: DigitsCorpus, name: str, **settings: Any) -> tuple[Setup, Row]:
    options = ViltaOptions(data=SMALL, vilta=ViltaSettings(**settings))
    row = next(row for row in rows_of(options) if row.name == f"{name}, pre-training")
    return VILTA.set_up(options, corpus, Task(0, row), None), row


def test_each_variant_is_pre_trained_and_fine_tuned_with_and_without_villa() -> None:
    rows = rows_of(ViltaOptions())
    names = [
        f"{variant}{stage}" for stage in ("", ", VILLA") for variant in ("plain", "soft-labels", "negatives", "both")
    ]
    assert [row.name for row in rows] == [*(f"{name}, pre-training" for name in names), *names]
    assert len({row.key for row in rows}) == 16
    for row in rows:
        assert (row.method is not None) == ("VILLA" in row.name)
    assert [row.start for row in rows[8:]] == rows[:8]


@pytest.mark.parametrize("villa", ["", ", VILLA"], ids=["standard", "villa"])
def test_each_variant_trains_as_it_says(corpus: DigitsCorpus, villa: str) -> None:
    for variant in ("plain", "soft-labels", "negatives", "both"):
        setup, row = made(corpus, f"{variant}{villa}")
        soft, edited = variant in ("soft-labels", "both"), variant in ("negatives", "both")
        assert isinstance(setup.train.negatives, HardNegatives) == edited  # type: ignore[attr-defined]
        assert (setup.method is not None) == soft
        if soft:
            assert isinstance(setup.method, dict)
            assert isinstance(setup.method["mlm"].regularizers[-1].reference, Averaged)
            assert setup.method.get("itm") is row.method
            assert setup.adversarial_tasks is None


def test_replaced_words_are_content_words_of_the_captions(corpus: DigitsCorpus) -> None:
    setup, _ = made(corpus, "negatives", synthesised=0.7, similar=0.2)
    negatives = setup.train.negatives  # type: ignore[attr-defined]
    vocabulary = corpus.tokenizer.get_vocab()
    assert negatives.content[vocabulary["three"]]
    assert not negatives.content[[vocabulary[word] for word in ("[MASK]", "and", "at", "the", ":", "q")]].any()
    assert (negatives.synthesised, negatives.similar) == (0.7, 0.2)
    assert negatives.nearest is not None


def test_the_teacher_is_chosen(corpus: DigitsCorpus) -> None:
    setup, _ = made(corpus, "soft-labels", teacher="live")
    assert isinstance(setup.method, dict)
    assert isinstance(setup.method["mlm"].regularizers[-1].reference, LiveText)


def bert(corpus: DigitsCorpus, folder: Path, *, words: list[str] | None = None, extra: int = 0) -> str:
    """The folder of a small masked-language model, with a vocab.txt if there are words."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=corpus.vocab_size + extra, **sizes)).save_pretrained(folder)
    if words is not None:
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


def vocabulary(corpus: DigitsCorpus) -> list[str]:
    found = corpus.tokenizer.get_vocab()
    return sorted(found, key=found.__getitem__)


def test_a_bert_is_the_teacher_of_soft_labels_and_the_filter_of_negatives(corpus: DigitsCorpus, tmp_path: Path) -> None:
    folder = bert(corpus, tmp_path / "bert", words=vocabulary(corpus))
    setup, _ = made(corpus, "both", teacher="bert", bert=folder)
    assert isinstance(setup.method, dict)
    reference = setup.method["mlm"].regularizers[-1].reference
    assert isinstance(reference, Frozen)
    assert isinstance(reference.frozen, BertTeacher)
    assert setup.train.negatives.teacher is reference.frozen  # type: ignore[attr-defined]
    assert not any(parameter.requires_grad for parameter in reference.frozen.parameters())


def test_a_bert_of_other_words_is_refused_before_any_work(corpus: DigitsCorpus, tmp_path: Path) -> None:
    words = vocabulary(corpus)
    cases = [
        (bert(corpus, tmp_path / "larger", extra=1), "vocabulary of the UNITER"),
        (
            bert(corpus, tmp_path / "shuffled", words=[*words[:-2], words[-1], words[-2]]),
            "the UNITER.s word .* in",
        ),
    ]
    for folder, message in cases:
        options = ViltaOptions(data=SMALL, vilta=ViltaSettings(teacher="bert", bert=folder))
        with pytest.raises(ConfigurationError, match=message):
            VILTA.prepare(options, tmp_path)
    options = ViltaOptions(data=SMALL, vilta=ViltaSettings(teacher="bert", bert=str(tmp_path / "none")))
    with pytest.raises(CheckpointError, match="the folder of a masked-language model"):
        VILTA.prepare(options, tmp_path)


def test_what_a_trained_teacher_teaches_starts_from_it() -> None:
    rows = rows_of(ViltaOptions(vilta=ViltaSettings(teacher="bert")))
    assert rows[0] == TEACHER
    assert [row.start for row in rows[1:5]] == [None, TEACHER, TEACHER, TEACHER]
    assert TEACHER not in rows_of(ViltaOptions(variants=("plain",), vilta=ViltaSettings(teacher="bert")))
    assert TEACHER not in rows_of(ViltaOptions(vilta=ViltaSettings(teacher="bert", bert="folder")))
    assert TEACHER not in rows_of(ViltaOptions())


@pytest.mark.slow
def test_a_run_trains_its_teacher_and_draws_accuracy_against_updates(
    corpus: DigitsCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = OptimizerOptions(epochs=3, batch_size=4)
    options = ViltaOptions(
        output=str(tmp_path / "run"),
        jobs=1,
        device="cpu",
        data=SMALL,
        methods=("standard",),
        variants=("plain", "both"),
        curve_points=3,
        pretrain=short,
        finetune=short,
        evaluation=EvaluationOptions(radii=(0.5,), text_radii=(), steps=1, restarts=1, examples=4),
        vilta=ViltaSettings(teacher="bert"),
    )
    run(VILTA, options, progress=False)
    said = capsys.readouterr().out
    assert "Validation accuracy, in per cent, by the share of updates that are done:" in said
    folder = tmp_path / "run" / "seed-0"
    names = ["teacher", "pretrained-plain-standard", "pretrained-both-standard", "plain-standard", "both-standard"]
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    for record in records.values():
        assert list(record["curve"]) == ["10", "20", "30"]
        assert all(0 <= score <= 1 for score in record["curve"].values())
    assert records["pretrained-both-standard"]["start"]["sha256"] == records["teacher"]["sha256"]
    for kind in ("md", "png"):
        assert (tmp_path / "run" / f"accuracy_against_updates.{kind}").stat().st_size > 0

    both = next(row for row in rows_of(options) if row.key == "pretrained-both-standard")
    setup = VILTA.set_up(options, corpus, Task(0, both), folder / "teacher.safetensors")
    taught = setup.method["mlm"].regularizers[-1].reference.frozen  # type: ignore[index,union-attr]
    weights = read_state(folder / "teacher.safetensors")
    for name, value in taught.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    untrained = VILTA.set_up(options, corpus, Task(0, TEACHER), None).model
    assert not torch.equal(taught.bert.get_input_embeddings().weight, untrained.bert.get_input_embeddings().weight)


def test_the_last_score_of_each_model_stands_under_all_updates_whatever_their_number(tmp_path: Path) -> None:
    """Samplers give seeds and rows a few updates more or fewer, and so a point of the curve."""
    directory = claim(str(tmp_path / "run"), {})
    start = Row("plain, pre-training", stage="pretrain", file="start")
    rows = [Row("plain", start=start), Row("both", start=start)]
    counts = [(rows[0], 4, 3), (rows[1], 3, 3), (start, 2, 2)]
    for row, seed, count in ((row, seed, found) for row, *both in counts for seed, found in enumerate(both)):
        curve = {str(10 * (point + 1)): 0.9 if point + 1 == count else 0.1 * point for point in range(count)}
        write_json(directory / Task(seed, row).record, {"curve": curve})
    text = report_convergence(rows, (0, 1), directory, pretrained="words", finetuned="answers")
    answers = text[text.index("Answers") :].splitlines()
    assert [line.split("|")[-3].strip() for line in answers[4:6]] == ["90.0", "90.0"]
    assert {line.count("|") for line in answers[2:6]} == {6}
    assert "| 100 % | updates |" in answers[2]


def test_the_curve_of_a_model_scores_the_same_examples_each_time(corpus: DigitsCorpus) -> None:
    for options in (ViltaOptions(data=SMALL), replace(ViltaOptions(data=SMALL), curve_points=3)):
        setup = VILTA.set_up(options, corpus, Task(0, rows_of(options)[0]), None)
        assert setup.evaluations == options.curve_points
        assert setup.evaluate is not None
        setup.model.eval()
        assert setup.evaluate(setup.model) == setup.evaluate(setup.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("freelb",)}, "expected methods of standard, both-stages, got freelb"),
        ({"checkpoint": "some.pt"}, "expected no checkpoint"),
        ({"variants": ("hard",)}, "variants"),
        ({"curve_points": 0}, "curve_points"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ViltaOptions(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"momentum": 5.0}, "momentum"),
        ({"momentum": 1.0}, "momentum"),
        ({"temperature": "x"}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"synthesised": -0.1}, "synthesised"),
        ({"similar": 1.1}, "similar"),
        ({"synthesised": 0.9, "similar": 0.9}, "at most 1 together, got synthesised=0.9, similar=0.9; lower"),
        ({"words": -1.0}, "words"),
        ({"threshold": 7.0}, "threshold"),
        ({"proposals": 0}, "proposals"),
        ({"teacher": "gpt"}, "teacher"),
        ({"bert": "folder"}, "expected teacher bert with a folder of one, got momentum"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ViltaSettings(**settings)
