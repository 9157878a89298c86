"""Batches: what they hold, cut and padded how, and that they hold what the corpus says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.draws import generator

from advvl.data.digits.corpus import DigitsConfig, DigitsCorpus, digits_corpus
from advvl.data.digits.sources import CaptionSource
from advvl.data.uniter.sources import TASKS
from advvl.data.wordpiece import CLS, MASK, SEP
from advvl.errors import ConfigurationError, DataError
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA

SHARED = {
    "input_ids",
    "position_ids",
    "img_feat",
    "img_pos_feat",
    "attn_masks",
    "gather_index",
    "txt_lens",
    "num_bbs",
}
INDICES = [5, 0, 17, 3, 3, 41, 8]


@pytest.fixture(scope="module")
def corpus() -> DigitsCorpus:
    return digits_corpus(
        DigitsConfig(
            train_questions=60, validation_questions=20, test_questions=20, captions=60, validation_captions=10
        )
    )


def of(corpus: DigitsCorpus, task: str) -> CaptionSource:
    return replace(corpus.pretrain, tasks=(task,))


def pair(batch: dict[str, Any], row: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The text and the regions of a row, unpadded."""
    text, regions = int(batch["txt_lens"][row]), int(batch["num_bbs"][row])
    return (
        batch["input_ids"][row, :text].tolist(),
        batch["img_feat"][row, :regions],
        batch["img_pos_feat"][row, :regions],
    )


def test_a_batch_of_questions_gives_back_their_words_regions_and_answers(corpus: DigitsCorpus) -> None:
    source = corpus.train
    batch = source.batch(INDICES)
    assert set(batch) == SHARED | {"targets"}
    for row, index in enumerate(INDICES):
        question = source.questions[index]
        scene = source.scenes[question.scene]
        ids, features, boxes = pair(batch, row)
        assert (ids[0], ids[-1]) == (CLS, SEP)
        assert corpus.tokenizer.decode(ids, skip_special_tokens=True) == question.text
        assert features.shape == (len(scene), corpus.feature_dim)
        cells = (boxes[:, 1] * 3).round() * 3 + (boxes[:, 0] * 3).round()
        assert cells.tolist() == list(scene.cells)
        assert batch["targets"][row].sum() == 1.0
        assert corpus.answers[int(batch["targets"][row].argmax())] == question.answer


@pytest.mark.parametrize("task", ["vqa", *TASKS])
def test_padding_is_zero_and_cut_to_the_batch(corpus: DigitsCorpus, task: str) -> None:
    source = corpus.train if task == "vqa" else of(corpus, task)
    for indices in (INDICES, [2], list(range(len(source)))):
        batch = source.batch(indices, generator())
        texts, regions = batch["txt_lens"], batch["num_bbs"]
        assert batch["input_ids"].shape == (len(indices), int(texts.max()))
        assert torch.equal(batch["position_ids"], torch.arange(int(texts.max()))[None])
        assert batch["img_feat"].shape == (len(indices), int(regions.max()), 64)
        assert batch["img_pos_feat"].shape == (len(indices), int(regions.max()), 7)
        no_text = torch.arange(int(texts.max())) >= texts[:, None]
        no_region = torch.arange(int(regions.max())) >= regions[:, None]
        assert not bool(batch["input_ids"][no_text].any())
        assert bool(batch["input_ids"][~no_text].all())
        assert not bool(batch["img_feat"][no_region].any())
        assert not bool(batch["img_pos_feat"][no_region].any())
        assert bool(batch["img_pos_feat"][~no_region][:, 4:].all())
        lengths = texts + regions
        assert batch["attn_masks"].shape == batch["gather_index"].shape == (len(indices), int(lengths.max()))
        assert torch.equal(batch["attn_masks"].sum(1), lengths)
        assert not bool((batch["attn_masks"].diff(dim=1) > 0).any())


@pytest.mark.parametrize("task", TASKS)
def test_the_gathered_sequence_is_the_text_then_the_regions(corpus: DigitsCorpus, task: str) -> None:
    batch = of(corpus, task).batch(INDICES, generator())
    longest = batch["input_ids"].shape[1]
    for row in range(len(INDICES)):
        text, regions = int(batch["txt_lens"][row]), int(batch["num_bbs"][row])
        expected = [*range(text), *range(longest, longest + regions)]
        assert batch["gather_index"][row, : text + regions].tolist() == expected


def test_a_batch_of_mlm_hides_words_and_no_region(corpus: DigitsCorpus) -> None:
    source = of(corpus, "mlm")
    batch = source.batch(INDICES, generator())
    assert set(batch) == SHARED | {"txt_labels", "task"}
    chosen = batch["txt_labels"] != -1
    whole = torch.where(chosen, batch["txt_labels"], batch["input_ids"])
    assert bool((batch["input_ids"] == MASK).any())
    for row, index in enumerate(INDICES):
        caption = source.captions[index]
        ids = whole[row, : int(batch["txt_lens"][row])].tolist()
        assert corpus.tokenizer.decode(ids, skip_special_tokens=True) == caption.text
    assert torch.equal(
        batch["img_feat"], source.images.features[source.image_rows[INDICES], : batch["img_feat"].shape[1]]
    )


def test_a_batch_of_itm_shows_the_captions_own_scene_exactly_where_it_says_so(corpus: DigitsCorpus) -> None:
    source = of(corpus, "itm")
    indices = list(range(len(source)))
    batch = source.batch(indices, generator())
    assert set(batch) == SHARED | {"targets", "task"}
    assert batch["targets"].dtype == torch.long
    assert 10 < int(batch["targets"].sum()) < 50
    for row, index in enumerate(indices):
        ids, features, _ = pair(batch, row)
        caption = source.captions[index]
        assert corpus.tokenizer.decode(ids, skip_special_tokens=True) == caption.text
        own = source.images.features[caption.scene, : len(source.scenes[caption.scene])]
        assert torch.equal(features, own) == bool(batch["targets"][row])


@pytest.mark.parametrize("task", ["mrfr", "mrc", "mrc-kl"])
def test_a_batch_of_region_modelling_hides_regions_and_keeps_what_they_were(corpus: DigitsCorpus, task: str) -> None:
    source = of(corpus, task)
    batch = source.batch(INDICES, generator())
    kept = "feat_targets" if task == "mrfr" else "label_targets"
    assert set(batch) == SHARED | {"img_masks", "img_mask_tgt", kept, "task"}
    masks = batch["img_masks"]
    assert masks.dtype == batch["img_mask_tgt"].dtype == torch.bool
    assert not bool(batch["img_feat"][masks].any())
    assert torch.equal(batch["img_mask_tgt"].sum(1), masks.sum(1))
    assert bool(batch["attn_masks"][batch["img_mask_tgt"]].all())
    places = torch.arange(masks.shape[1]) + batch["input_ids"].shape[1]
    assert torch.equal(batch["gather_index"][batch["img_mask_tgt"]], places.expand_as(masks)[masks])
    scenes = [source.scenes[source.captions[index].scene] for index in INDICES]
    digits = [scenes[row].digits[region] for row, region in masks.nonzero().tolist()]
    if task == "mrfr":
        restored = batch["img_feat"].masked_scatter(masks[..., None], batch[kept])
        assert torch.equal(restored, source.images.features[source.image_rows[INDICES], : masks.shape[1]])
    else:
        assert batch[kept].shape == (len(digits), corpus.label_dim)
        assert torch.equal(batch[kept].sum(1), torch.ones(len(digits)))
        assert (batch[kept].argmax(1) - 1).tolist() == digits


@pytest.mark.parametrize("task", ["vqa", *TASKS])
def test_uniter_takes_every_batch_and_gives_a_finite_loss(corpus: DigitsCorpus, task: str) -> None:
    config = UniterConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=corpus.max_text_length,
        img_dim=corpus.feature_dim,
        img_label_dim=corpus.label_dim,
    )
    if task == "vqa":
        output = UniterForVQA(config, num_answers=len(corpus.answers))(**corpus.train.batch(INDICES))
    else:
        output = UniterForPretraining(config)(**of(corpus, task).batch(INDICES, generator()))
    assert bool(output.loss.isfinite().all())


def test_a_batch_leaves_the_corpus_as_it_was(corpus: DigitsCorpus) -> None:
    before = corpus.digest
    for task in TASKS:
        of(corpus, task).batch(INDICES, generator())
    assert corpus.digest == before


def test_a_batch_depends_on_indices_and_generator_alone(corpus: DigitsCorpus) -> None:
    first, again = (corpus.pretrain.batch(INDICES, generator(4)) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first if name != "task")
    assert len({corpus.pretrain.batch(INDICES, generator(seed))["task"] for seed in range(20)}) == 3


@pytest.mark.slow
def test_tasks_come_as_often_as_they_are_named(corpus: DigitsCorpus) -> None:
    source = replace(corpus.pretrain, tasks=("itm", "itm", "mrc-kl"))
    drawn = generator()
    tasks = [source.batch([0], drawn)["task"] for _ in range(900)]
    assert abs(tasks.count("itm") - 600) < 50
    assert tasks.count("itm") + tasks.count("mrc-kl") == 900


@pytest.mark.parametrize("tasks", [(), ("wra",), "mlm"], ids=["none", "unknown", "text"])
def test_tasks_that_do_not_exist_are_refused(corpus: DigitsCorpus, tasks: Any) -> None:
    with pytest.raises(ConfigurationError, match="mlm, itm, mrfr"):
        replace(corpus.pretrain, tasks=tasks)


@pytest.mark.parametrize("share", [0.15, 0.5], ids=str)
def test_mlm_hides_the_share_of_words_that_is_asked(corpus: DigitsCorpus, share: float) -> None:
    source = replace(of(corpus, "mlm"), word_mask=share)
    batch = source.batch(list(range(60)) * 5, generator())
    words = int((batch["txt_lens"] - 2).sum())
    assert int((batch["txt_labels"] != -1).sum()) / words == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("indices", [[], [-1], [60]], ids=["none", "negative", "beyond"])
def test_indices_outside_the_source_are_refused(corpus: DigitsCorpus, indices: list[int]) -> None:
    for source in (corpus.train, corpus.pretrain):
        with pytest.raises(DataError, match=r"0\.\.59"):
            source.batch(indices, generator())


@pytest.mark.parametrize("task", TASKS)
def test_an_examples_corruption_does_not_depend_on_the_others_of_its_batch(corpus: DigitsCorpus, task: str) -> None:
    """What processes that share a batch rely on: each makes its own rows, and together they are the batch."""
    source = of(corpus, task)
    indices = [5, 0, 17, 3, 41, 8, 22]
    whole, parts = source.batch(indices, generator(1)), [source.batch(indices[r::2], generator(1)) for r in range(2)]
    kept = {"mrfr": "feat_targets", "mrc": "label_targets", "mrc-kl": "label_targets"}.get(task)
    owners = whole["img_masks"].nonzero()[:, 0] if kept else None
    for rank, part in enumerate(parts):
        for row in range(len(part["txt_lens"])):
            at = rank + 2 * row
            for ours, theirs in zip(pair(part, row), pair(whole, at), strict=True):
                assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
            if task == "itm":
                assert part["targets"][row] == whole["targets"][at]
            if task == "mlm":
                words = int(part["txt_lens"][row])
                assert torch.equal(part["txt_labels"][row, :words], whole["txt_labels"][at, :words])
            if kept and owners is not None:
                mine = part["img_masks"].nonzero()[:, 0] == row
                assert torch.equal(part[kept][mine], whole[kept][owners == at])
