"""The corpus as a whole: the same everywhere, its parts apart, its sizes as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from advvl.data.digits.corpus import DigitsConfig, DigitsCorpus, digits_corpus
from advvl.data.digits.scans import load_digit_images
from advvl.errors import ConfigurationError

pytestmark = pytest.mark.slow

SMALL = DigitsConfig(train_questions=50, validation_questions=21, test_questions=30, captions=40, validation_captions=9)


@pytest.fixture(scope="module")
def corpus() -> DigitsCorpus:
    return digits_corpus()


def test_the_default_corpus_is_pinned(corpus: DigitsCorpus) -> None:
    assert corpus.digest == "a8fb09543c4d8c2f5f3346138e6d42298c2fc06bd2b2c0bea47874e15113d626"


def test_neither_the_global_generators_nor_another_seed_make_the_same() -> None:
    before = torch.get_rng_state()
    digests = {digits_corpus(replace(SMALL, seed=seed)).digest for seed in (0, 1, 0)}
    assert len(digests) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_parts_show_the_same_scan(corpus: DigitsCorpus) -> None:
    train, validation, test = (
        {image for source in sources for scene in source.scenes for image in scene.images}
        for sources in (
            (corpus.train, corpus.pretrain),
            (corpus.validation, corpus.pretrain_validation),
            (corpus.test,),
        )
    )
    assert len(train) == 300
    assert 390 <= len(validation) <= 400
    assert 800 < len(test) <= 1097
    assert train.isdisjoint(validation)
    assert train.isdisjoint(test)
    assert validation.isdisjoint(test)


def test_regions_are_the_scans_of_the_scene(corpus: DigitsCorpus) -> None:
    scans = torch.from_numpy(load_digit_images().features)
    source = corpus.test
    for row in (0, 7, 499):
        scene = source.scenes[row]
        assert torch.equal(source.images.features[row, : len(scene)], scans[list(scene.images)])


def test_sizes_are_as_requested() -> None:
    made = digits_corpus(SMALL)
    sizes = [len(s) for s in (made.train, made.validation, made.test, made.pretrain, made.pretrain_validation)]
    assert sizes == [50, 21, 30, 40, 9]
    assert len(made.train.scenes) == 13
    assert len(made.pretrain.scenes) == 20


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_no_answer_dominates_a_part(corpus: DigitsCorpus, part: str) -> None:
    source = getattr(corpus, part)
    counts = Counter(question.answer for question in source.questions)
    assert set(counts) == set(corpus.answers) - {"first", "second", "third"}  # of families not asked by default
    assert abs(counts["yes"] - counts["no"]) <= 3
    assert max(counts.values()) / len(source) < 0.17  # yes and no answer two families of six


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("count", "colour")}, "expected families to be one or more of exists, count"),
        ({"families": ()}, "expected families"),
        ({"families": ("count", "relation")}, r"expected a whole number in 1\.\.1 for questions_per_scene, got 4"),
    ],
    ids=["unknown", "none", "too few that every scene answers"],
)
def test_families_that_make_no_sense_are_refused(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DigitsConfig(**options)


def test_making_one_part_larger_leaves_the_others_and_its_own_beginning() -> None:
    small, large = digits_corpus(SMALL), digits_corpus(replace(SMALL, train_questions=500))
    assert large.test.questions == small.test.questions
    assert large.pretrain.captions == small.pretrain.captions
    assert list(large.train.questions[:48]) == list(small.train.questions[:48])


def test_every_word_is_in_the_vocabulary(corpus: DigitsCorpus) -> None:
    words = {word for question in corpus.test.questions for word in question.text.split()}
    assert all(corpus.tokenizer.token_to_id(word) is not None for word in words)
    assert corpus.vocab_size == corpus.tokenizer.get_vocab_size() < 200
    longest = max(len(caption.text.split()) for caption in corpus.pretrain.captions)
    assert corpus.max_text_length == longest + 2


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"train_images": 9},
        {"validation_images": 1600},
        {"train_questions": 0},
        {"test_questions": 1.5},
        {"captions": True},
        {"questions_per_scene": 7},
        {"captions_per_scene": 0},
        {"captions": 2},
        {"tasks": ("vqa",)},
        {"captions_per_scene": 4},
        {"word_mask": 1.5},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        digits_corpus(replace(SMALL, **change))
