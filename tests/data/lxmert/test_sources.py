"""LXMERT's batches: which fields, cut and padded how, and that they hold what the files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.lxmert_files import regions
from tokenizers import Tokenizer

from advvl.data.lxmert.answers import AnswerTable
from advvl.data.lxmert.lines import Regions
from advvl.data.lxmert.questions import Statement, VisualQuestion
from advvl.data.lxmert.regions import RegionFile, open_regions, write_regions
from advvl.data.lxmert.sources import Pictures, Sentences, StatementSource, VisualQuestionSource
from advvl.data.wordpiece import CLS, PAD, SEP, build_tokenizer
from advvl.errors import ConfigurationError, DataError

SHORT = "is there a net"
LONG = " ".join(["there is a net and there is a tower"] * 4)
ANSWERS = AnswerTable(("no", "yes", "net"))
TEXT = {"input_ids", "attention_mask", "token_type_ids"}


@pytest.fixture
def sentences() -> Sentences:
    return Sentences(build_tokenizer([SHORT, LONG]))


def image(name: str, count: int = 36, *, feature_dim: int = 5) -> Regions:
    """Every name's image is another."""
    return regions(name, count, seed=ord(name), feature_dim=feature_dim)


def region_file(path: Path, counts: dict[str, int], *, num_boxes: int | None = 36, feature_dim: int = 5) -> RegionFile:
    write_regions(path, (image(name, count, feature_dim=feature_dim) for name, count in counts.items()))
    return open_regions(path, num_boxes=num_boxes)


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Images a, b and c of 36 regions, in two files."""
    return Pictures(
        (region_file(tmp_path / "train.tsv", {"a": 36, "b": 36}), region_file(tmp_path / "val.tsv", {"c": 36}))
    )


def questions() -> list[VisualQuestion]:
    return [
        VisualQuestion(1, "a", SHORT, {"yes": 1.0}),
        VisualQuestion(2, "c", LONG, {"net": 0.6, "no": 0.3}),
        VisualQuestion(3, "b", "is there a net", {}),
        VisualQuestion(4, "a", "a tower", {"no": 1.0}),
    ]


def statements() -> list[Statement]:
    return [
        Statement("u0", "dev-0-0-0", ("a", "b"), SHORT, 1),
        Statement("u1", "dev-0-1-0", ("b", "c"), LONG, 0),
        Statement("u2", "dev-0-2-0", ("a", "a"), SHORT, 1),
    ]


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("words", [1, 17, 18, 19, 40])
def test_a_text_is_cut_and_padded_to_twenty_tokens_between_its_marks(sentences: Sentences, words: int) -> None:
    text = " ".join(["net"] * words)
    fields = sentences.fields([text, "net"])
    kept = min(words, 18)
    net = tokens_of(sentences.tokenizer, "net")[0]
    assert fields["input_ids"][0].tolist() == [CLS, *[net] * kept, SEP, *[PAD] * (18 - kept)]
    assert fields["attention_mask"].tolist() == [[1] * (kept + 2) + [0] * (18 - kept), [1] * 3 + [0] * 17]
    assert not fields["token_type_ids"].any()
    assert all(field.shape == (2, 20) and field.dtype == torch.long for field in fields.values())


def test_a_tokenizer_that_pads_and_adds_marks_by_itself_changes_nothing(sentences: Sentences) -> None:
    expected = sentences.fields([SHORT, LONG])
    own = Tokenizer.from_str(sentences.tokenizer.to_str())
    own.enable_padding(length=50)
    own.enable_truncation(40)
    found = Sentences(own).fields([SHORT, LONG])
    assert all(torch.equal(found[name], field) for name, field in expected.items())


def test_a_tokenizer_without_berts_marks_is_refused(sentences: Sentences) -> None:
    stripped = sentences.tokenizer.to_str().replace("[SEP]", "</s>")
    with pytest.raises(ConfigurationError, match=r"\[PAD\], \[CLS\], \[SEP\]"):
        Sentences(Tokenizer.from_str(stripped))


def test_a_length_without_room_for_a_word_is_refused(sentences: Sentences) -> None:
    with pytest.raises(ConfigurationError, match="length to be a whole number of 3 or more, got 2"):
        Sentences(sentences.tokenizer, length=2)


def test_a_batch_of_questions_is_what_the_files_say(pictures: Pictures, sentences: Sentences) -> None:
    source = VisualQuestionSource(questions(), pictures, ANSWERS, sentences)
    indices = [3, 1, 0, 1]
    batch = source.batch(indices, torch.Generator())
    assert set(batch) == TEXT | {"visual_feats", "visual_pos", "targets"}
    assert batch["visual_feats"].shape == (4, 36, 5)
    assert torch.equal(batch["targets"], torch.tensor([[1, 0, 0], [0.3, 0, 0.6], [0, 1, 0], [0.3, 0, 0.6]]))
    for row, index in enumerate(indices):
        question = questions()[index]
        expected = image(question.image_id)
        assert torch.equal(batch["visual_feats"][row], expected.features)
        assert torch.equal(batch["visual_pos"][row], expected.boxes / torch.tensor([640.0, 480.0, 640.0, 480.0]))
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert ids == [CLS, *tokens_of(sentences.tokenizer, question.sentence)[:18], SEP]


def test_a_batch_of_sentences_has_both_images_of_each(pictures: Pictures, sentences: Sentences) -> None:
    source = StatementSource(statements(), pictures, sentences)
    batch = source.batch([1, 0], torch.Generator())
    assert set(batch) == TEXT | {"visual_feats", "visual_pos", "targets"}
    assert batch["visual_feats"].shape == (2, 2, 36, 5)
    assert batch["visual_pos"].shape == (2, 2, 36, 4)
    assert (batch["targets"].dtype, batch["targets"].tolist()) == (torch.long, [0, 1])
    for row, index in enumerate([1, 0]):
        for side, image_id in enumerate(statements()[index].image_ids):
            assert torch.equal(batch["visual_feats"][row, side], image(image_id).features)
            assert torch.equal(batch["visual_pos"][row, side], image(image_id).positions())


def test_images_of_fewer_regions_are_padded_with_zeros_and_masked(tmp_path: Path, sentences: Sentences) -> None:
    file = region_file(tmp_path / "a.tsv", {"a": 3, "b": 5, "c": 1}, num_boxes=None)
    pictures = Pictures((file,))
    batch = VisualQuestionSource(questions(), pictures, ANSWERS, sentences).batch([0, 1, 2])
    assert batch["visual_attention_mask"].tolist() == [[1] * 3 + [0] * 2, [1] + [0] * 4, [1] * 5]
    for row, (name, count) in enumerate({"a": 3, "c": 1, "b": 5}.items()):
        assert torch.equal(batch["visual_feats"][row, :count], file[name].features)
        assert not batch["visual_feats"][row, count:].any()
        assert not batch["visual_pos"][row, count:].any()
    pairs = StatementSource(statements(), pictures, sentences).batch([0, 1])
    assert pairs["visual_attention_mask"].sum(2).tolist() == [[3, 5], [5, 1]]


def test_a_batch_depends_on_its_indices_alone(pictures: Pictures, sentences: Sentences) -> None:
    source = VisualQuestionSource(questions(), pictures, ANSWERS, sentences)
    before = torch.random.get_rng_state()
    one, other = source.batch([2, 0], torch.Generator().manual_seed(1)), source.batch([2, 0])
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(source.batch([0])["visual_feats"][0], one["visual_feats"][1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_test_split_gives_batches_without_targets(pictures: Pictures, sentences: Sentences) -> None:
    unknown = [VisualQuestion(1, "a", SHORT), VisualQuestion(2, "b", SHORT)]
    assert "targets" not in VisualQuestionSource(unknown, pictures, ANSWERS, sentences).batch([0, 1])
    pair = [Statement("u", "test1-0-0-0", ("a", "b"), SHORT)]
    assert "targets" not in StatementSource(pair, pictures, sentences).batch([0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            [VisualQuestion(7, "z", SHORT, {})],
            r"question 7: expected the image 'z' in .*train\.tsv.*val\.tsv, got none",
        ),
        ([VisualQuestion(7, "a", SHORT, {"sea": 1.0})], "question 7: expected an answer of the table's 3, got 'sea'"),
        ([VisualQuestion(7, "a", SHORT, {}), VisualQuestion(8, "a", SHORT)], "1 of 2 with one"),
        ([], "one example or more"),
    ],
    ids=["image", "answer", "labels", "none"],
)
def test_questions_that_cannot_be_asked_are_named_at_once(
    pictures: Pictures, sentences: Sentences, asked: list[VisualQuestion], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        VisualQuestionSource(asked, pictures, ANSWERS, sentences)


def test_answers_that_gqas_table_lacks_get_no_target(pictures: Pictures, sentences: Sentences) -> None:
    asked = [VisualQuestion("1", "a", SHORT, {"sea": 1.0}), VisualQuestion("2", "a", SHORT, {"yes": 1.0})]
    source = VisualQuestionSource(asked, pictures, ANSWERS, sentences, unknown="leave out")
    assert source.batch([0, 1])["targets"].tolist() == [[0, 0, 0], [0, 1, 0]]


def test_sentences_about_a_missing_image_are_named(pictures: Pictures, sentences: Sentences) -> None:
    with pytest.raises(DataError, match="sentence 'u': expected the image 'z'"):
        StatementSource([Statement("u", "dev-0-0-0", ("a", "z"), SHORT, 1)], pictures, sentences)


def test_files_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one = region_file(tmp_path / "one.tsv", {"a": 36, "b": 36})
    with pytest.raises(DataError, match=r"as many features per region, got .*one\.tsv': 5.*two\.tsv': 6"):
        Pictures((one, region_file(tmp_path / "two.tsv", {"c": 36}, feature_dim=6)))
    with pytest.raises(DataError, match="got 'b' in several"):
        Pictures((one, region_file(tmp_path / "two.tsv", {"c": 36, "b": 36})))
    with pytest.raises(DataError, match="one region file or more"):
        Pictures(())


@pytest.mark.parametrize("indices", [[], [-1], [4]])
def test_indices_out_of_range_are_refused(pictures: Pictures, sentences: Sentences, indices: list[int]) -> None:
    source: Any = VisualQuestionSource(questions(), pictures, ANSWERS, sentences)
    with pytest.raises(DataError, match=r"0\.\.3"):
        source.batch(indices)
