"""The digits in LXMERT's formats say what the corpus says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from advvl.data.digits.as_lxmert import PARTS, TABLE, TOKENIZER, write_digits
from advvl.data.digits.corpus import DigitsConfig, DigitsCorpus, digits_corpus
from advvl.data.lxmert.answers import read_answers
from advvl.data.lxmert.questions import read_questions
from advvl.data.lxmert.regions import open_regions
from advvl.data.lxmert.sources import Pictures, Sentences, VisualQuestionSource
from advvl.data.wordpiece import load_bert_tokenizer


@pytest.fixture(scope="module")
def corpus() -> DigitsCorpus:
    return digits_corpus(
        DigitsConfig(train_questions=40, validation_questions=12, test_questions=12, captions=9, validation_captions=9)
    )


@pytest.fixture(scope="module")
def directory(corpus: DigitsCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    write_digits(corpus, directory)
    return directory


@pytest.mark.parametrize("part", PARTS)
def test_a_batch_from_the_files_is_one_from_the_corpus(corpus: DigitsCorpus, directory: Path, part: str) -> None:
    numbers, listed = TABLE
    source = VisualQuestionSource(
        read_questions(directory / f"{part}.json"),
        Pictures([open_regions(directory / f"{part}_obj.tsv", num_boxes=None)]),
        read_answers(directory / numbers, directory / listed, size=len(corpus.answers)),
        Sentences(load_bert_tokenizer(directory / TOKENIZER)),
    )
    made = getattr(corpus, part)
    indices = [5, 0, 11, 3]
    found, expected = source.batch(indices), made.batch(indices)
    regions, words = expected["img_feat"].shape[1], expected["input_ids"].shape[1]
    assert len(source) == len(made)
    assert torch.equal(found["targets"], expected["targets"])
    assert torch.equal(found["input_ids"][:, :words], expected["input_ids"])
    assert torch.equal(found["attention_mask"].sum(1), expected["txt_lens"])
    assert torch.equal(found["visual_attention_mask"].sum(1), expected["num_bbs"])
    assert torch.equal(found["visual_feats"][:, :regions], expected["img_feat"])
    torch.testing.assert_close(found["visual_pos"][:, :regions], expected["img_pos_feat"][..., :4])


def test_regions_are_the_digits_with_their_class_and_nothing_made_up(corpus: DigitsCorpus, directory: Path) -> None:
    file = open_regions(directory / "train_obj.tsv", num_boxes=None)
    assert len(file) == len(corpus.train.scenes)
    for number, scene in enumerate(corpus.train.scenes):
        image = file[f"digits-train-{number}"]
        assert image.object_ids.tolist() == list(scene.digits)
        assert (image.boxes[:, 2:] - image.boxes[:, :2] == 8).all()
