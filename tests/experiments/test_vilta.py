"""The ablation of ViLTA: which rows it has, what each one's pre-training is, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from advvl import Averaged
from advvl.data.digits.corpus import DigitsCorpus
from advvl.errors import ConfigurationError
from advvl.experiments import uniter
from advvl.experiments.experiment import Row, Setup, Task
from advvl.experiments.options import DataOptions
from advvl.experiments.vilta import ViltaOptions, ViltaSettings, rows_of, set_up
from advvl.tasks.uniter.soft_labels import LiveText
from advvl.tasks.uniter.synthesised import HardNegatives

SMALL = DataOptions(train_questions=40, test_questions=20, captions=40)


@pytest.fixture(scope="module")
def corpus() -> DigitsCorpus:
    return uniter.open_corpus(ViltaOptions(data=SMALL), None)  # type: ignore[arg-type]


def made(corpus: DigitsCorpus, name: str, **settings: Any) -> tuple[Setup, Row]:
    options = ViltaOptions(data=SMALL, vilta=ViltaSettings(**settings))
    row = next(row for row in rows_of(options) if row.name == f"{name}, pre-training")
    return set_up(options, corpus, Task(0, row), None), row


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("freelb",)}, "expected methods of standard, both-stages, got freelb"),
        ({"checkpoint": "some.pt"}, "expected no checkpoint"),
        ({"variants": ("hard",)}, "variants"),
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
        ({"synthesised": 0.9, "similar": 0.9}, "at most 1 together, got synthesised=0.9 and similar=0.9"),
        ({"words": -1.0}, "words"),
        ({"threshold": 7.0}, "threshold"),
        ({"proposals": 0}, "proposals"),
        ({"teacher": "bert"}, "teacher"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ViltaSettings(**settings)
