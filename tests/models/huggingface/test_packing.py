"""Texts without padding, samples without a picture, and masks of pairs: each sample has a ball of its own, all the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from support.hf_families import CLASSES, FAMILIES, IMAGE, WORDS, Family, Fields
from torch import Tensor

from advvl import L2, PGD, AdversarialTraining, Ascent, Attack, EmbeddingPerturber, FreeLB, Uniform, adapt
from advvl.errors import DataError, ShapeError
from advvl.models.huggingface import packing

pytestmark = pytest.mark.slow

TEXTS = [[1, 5, 6, 7], [1, 8, 9, 10, 11, 12, 13], [1, 20, 21]]
SAMPLES = [0] * 4 + [1] * 7 + [2] * 3


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, use_cache=False)).double().eval()


def padded() -> Fields:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in TEXTS], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def flat(**more: Any) -> Fields:
    """The texts in one row; the first word of each has no label, as it follows another text."""
    ids = torch.tensor([[word for text in TEXTS for word in text]])
    labels = torch.tensor([[label for text in TEXTS for label in (-100, *text[1:])]])
    return {"input_ids": ids, "labels": labels, **more}


def restarts() -> Tensor:
    return torch.tensor([[k for text in TEXTS for k in range(len(text))]])


def pairs() -> Tensor:
    own = torch.tensor(SAMPLES)
    return ((own[:, None] == own) & torch.ones(14, 14, dtype=torch.bool).tril())[None, None]


ENDS = torch.tensor([0, 4, 11, 14], dtype=torch.int32)

WAYS = {
    "position_ids": {"position_ids": restarts()},
    "ends of texts": {"position_ids": restarts(), "cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS},
    "index of texts": {"position_ids": restarts(), "seq_idx": torch.tensor([SAMPLES], dtype=torch.int32)},
    "mask of pairs": {"position_ids": restarts(), "attention_mask": pairs()},
    "additive mask": {
        "position_ids": restarts(),
        "attention_mask": torch.zeros(1, 1, 14, 14).double().masked_fill(~pairs(), -1e30),
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", [None, Uniform(0.1)])
def test_packed_texts_are_attacked_as_padded_ones(way: str, start: Any) -> None:
    ascent = Ascent(L2(0.3), step_size=0.3, **({} if start is None else {"start": start}))
    attack = Attack(EmbeddingPerturber(text=ascent), PGD(3))
    found = attack(adapt(llama()), flat(**WAYS[way])).deltas["text"][0]
    assert torch.equal(packing.samples(flat(**WAYS[way]), by_position=True)[0], torch.tensor(SAMPLES))
    norms = torch.stack([part.norm() for part in found.split([len(text) for text in TEXTS])])
    torch.testing.assert_close(norms, torch.full((3,), 0.3).double(), rtol=1e-6, atol=0)
    if start is None:
        batch = padded()
        expected = attack(adapt(llama()), batch).deltas["text"][batch["attention_mask"].bool()]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_step_on_packed_texts_reports_the_norm_of_each() -> None:
    method = AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), FreeLB(3))
    report = method.step(llama(), flat(position_ids=restarts()))
    torch.testing.assert_close(report.delta_norms["text"][:3], torch.full((3,), 0.3).double(), rtol=1e-6, atol=0)
    assert not report.delta_norms["text"][3:].any()


def test_no_packed_text_counts_as_unmoved_for_a_word_that_nothing_depends_on() -> None:
    attack = Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(2))
    assert not attack(adapt(llama()), flat(position_ids=restarts())).unmoved["text"].any()


@pytest.mark.parametrize(
    ("fields", "by_position"),
    [
        ({}, True),
        ({"position_ids": torch.arange(14)[None]}, True),
        ({"position_ids": restarts()}, False),  # of an encoder, which does not keep them apart
        ({"position_ids": restarts(), "attention_mask": torch.ones(1, 14)}, True),  # nor does a decoder, given a mask
    ],
    ids=["no fields", "one text", "an encoder", "a mask of words"],
)
def test_a_row_that_the_model_reads_as_one_text_is_one(fields: Fields, by_position: bool) -> None:
    assert packing.samples(flat(**fields), by_position=by_position) is None


def test_an_encoder_does_not_keep_texts_apart_by_positions() -> None:
    assert packing.separates_by_position(llama())
    assert not packing.separates_by_position(hf.BertModel(hf.BertConfig(**WORDS)))


def test_positions_of_images_start_again_where_all_axes_are_zero() -> None:
    axes = torch.tensor([[[0, 1, 1, 2, 0, 1]], [[0, 1, 1, 2, 0, 1]], [[0, 1, 2, 2, 0, 1]]])
    ids = torch.ones(1, 6, dtype=torch.long)
    for positions in (axes, torch.cat([torch.tensor([[[0, 1, 2, 3, 0, 1]]]), axes])):
        found = packing.samples({"input_ids": ids, "position_ids": positions}, by_position=True)
        assert found.tolist() == [[0, 0, 0, 0, 1, 1]]


def test_ends_of_other_texts_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"expected the ends of texts up to the 14 words of input_ids, got \[4, 11, 13\]"
    ):
        packing.samples(flat(cu_seq_lens_q=torch.tensor([0, 4, 11, 13])), by_position=True)


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.ones(4), "causal"], ids=str)
def test_a_mask_of_other_words_is_refused(mask: Any) -> None:
    with pytest.raises(DataError, match=r"expected attention_mask over the words of input_ids \(2, 4\), got"):
        packing.attended({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask})


@pytest.mark.parametrize("kind", ["bool", "additive", "three axes", "one for all heads"])
def test_the_words_of_a_mask_of_pairs_are_those_attended_to(kind: str) -> None:
    ids = torch.tensor([[1, 11, 12, 13, 2], [1, 14, 2, 0, 0]])
    real = ids > 0
    mask = (real[:, None, :] & torch.ones(5, 5, dtype=torch.bool).tril())[:, None]
    of = {
        "bool": mask,
        "additive": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        "three axes": mask[:, 0],
        "one for all heads": {"full_attention": mask, "sliding_attention": mask.triu(-1)},
    }[kind]
    batch = {"input_ids": ids, "attention_mask": of}
    assert torch.equal(packing.attended(batch), real)
    assert packing.samples(batch, by_position=True) is None


@pytest.mark.parametrize("make", [llama, lambda: hf.BertForSequenceClassification(hf.BertConfig(**WORDS, **CLASSES))])
def test_padding_in_a_mask_of_four_axes_stays_zero(make: Any) -> None:
    ids = torch.tensor([[1, 11, 12, 13, 2], [1, 14, 2, 0, 0]])
    real, model = ids > 0, make().double().eval()
    mask = real[:, None, None, :].expand(2, 1, 5, 5)
    labels = ids.masked_fill(~real, -100) if isinstance(model, hf.LlamaForCausalLM) else torch.tensor([0, 2])
    ascent = Ascent(L2(1.0), step_size=0.3, start=Uniform(1.0))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = Attack(EmbeddingPerturber(text=ascent), PGD(2))(adapt(model), batch).deltas["text"]
    assert found[real].any(-1).all()
    assert not found[~real].any()


# --- pictures ---


def llava() -> Any:
    return next(family for family in FAMILIES if family.name == "LLaVA").model()


def mixed(rows: list[list[int]]) -> Fields:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    images = int((ids == IMAGE).sum()) // 4
    torch.manual_seed(2)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": ids.masked_fill((ids == 0) | (ids == IMAGE), -100),
        "pixel_values": torch.rand(images, 3, 8, 8).double(),
    }


TEXT, PICTURE = [1, 7, 8, 2], [1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 2]


@pytest.mark.parametrize("rows", [[TEXT, PICTURE], [PICTURE, TEXT], [TEXT, TEXT, TEXT, PICTURE]], ids=len)
@pytest.mark.parametrize("modality", ["image", "image_tokens"])
@pytest.mark.parametrize("start", [None, Uniform(0.1)])
def test_the_picture_of_any_sample_is_perturbed_and_reported_there(rows: Any, modality: str, start: Any) -> None:
    ascent = Ascent(L2(0.5), step_size=0.5, **({} if start is None else {"start": start}))
    perturber, target, batch = EmbeddingPerturber(**{modality: ascent}), adapt(llava()), mixed(rows)
    assert Attack(perturber, PGD(2))(target, batch).deltas[modality].norm() == pytest.approx(0.5)
    norms = AdversarialTraining(perturber, FreeLB(3)).step(target, batch).delta_norms[modality]
    assert norms.nonzero().flatten().tolist() == [rows.index(PICTURE)]


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2.5-VL", "Idefics3"])
def test_pictures_of_packed_texts_are_of_their_own_texts(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    target, batch = family.adapter(), family.fields()
    expected = {modality: target.sites[modality].rows(batch) for modality in ("image", "image_tokens")}
    real = batch["attention_mask"].bool()
    ids = batch["input_ids"][real][None]
    position_ids = (real.long().cumsum(1) - 1)[real][None]
    if name == "Idefics3":
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)[None]
    packed = {**batch, "input_ids": ids, "attention_mask": None, "position_ids": position_ids}
    for modality, rows in expected.items():
        assert torch.equal(target.sites[modality].rows(packed), rows)


PICTURED = [family for family in FAMILIES if "image_tokens" in family.adapter().sites]


def after_a_text(batch: Fields) -> Fields:
    """The batch with a sample before it that has no picture."""
    text = torch.zeros_like(batch["input_ids"][:1])
    text[0, :4] = torch.tensor(TEXT)
    rows = {
        "input_ids": text,
        "attention_mask": (text > 0).long(),
        "labels": text.masked_fill(text == 0, -100),
        "mm_token_type_ids": torch.zeros_like(text, dtype=torch.int32),
        "token_type_ids": (text > 0).long(),
    }
    if batch["pixel_values"].ndim == 5 and "image_sizes" not in batch:  # a row of pictures for each sample
        rows |= {name: torch.zeros_like(batch[name][:1]) for name in ("pixel_values", "pixel_attention_mask")}
    return batch | {name: torch.cat([row, batch[name]]) for name, row in rows.items() if name in batch}


@pytest.mark.parametrize("family", PICTURED, ids=lambda family: family.name)
@pytest.mark.parametrize("modality", ["image", "image_tokens", "text"])
def test_a_sample_without_a_picture_changes_nothing_for_the_others(family: Family, modality: str) -> None:
    target, batch = family.adapter(), family.fields()
    attack = Attack(EmbeddingPerturber(**{modality: Ascent(L2(0.5), step_size=0.2)}), PGD(2))
    found, expected = attack(target, after_a_text(batch)).deltas[modality], attack(target, batch).deltas[modality]
    if modality == "text":
        assert found[0, :4].any()
        assert not found[0, 4:].any()
        found = found[1:]
    elif modality == "image":
        assert torch.equal(target.sites["image"].rows(after_a_text(batch)), target.sites["image"].rows(batch) + 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # transformers computes the loss in float32


DECODERS = [family for family in FAMILIES if family.name in ("GPT-2", "Llama", "Mistral", "Qwen2", "Qwen3")]


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_packed_texts_of_a_decoder_are_attacked_as_padded_ones(family: Family) -> None:
    attack = Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(2))
    rows = {"use_cache": False}  # with a cache transformers does not keep the texts apart
    found = attack(family.adapter(), flat(position_ids=restarts()) | rows).deltas["text"][0]
    expected = attack(family.adapter(), padded() | rows).deltas["text"][padded()["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if "text" in family.adapter().sites and family not in DECODERS],
    ids=lambda family: f"{family.name}-{FAMILIES.index(family)}",
)
def test_a_batch_of_one_text_a_row_is_not_packed(family: Family) -> None:
    assert family.adapter().sites["text"].rows(family.fields()) is None


def test_a_loss_for_fewer_samples_than_the_rows_are_of_is_refused() -> None:
    target = adapt(llama(), loss=lambda outputs, batch: outputs.logits.square().mean((1, 2)))
    attack = Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(2, keep="best"))
    with pytest.raises(
        ShapeError, match="one loss or verdict for each sample of 'text', got 1, and rows of sample 2; give"
    ):
        attack(target, flat(position_ids=restarts()))


def test_a_loss_for_each_packed_text_keeps_its_best() -> None:
    def losses(outputs: Any, batch: Fields) -> Tensor:
        rows = outputs.logits.square().mean(-1)[0]
        return torch.stack([part.mean() for part in rows.split([len(text) for text in TEXTS])])

    target, batch = adapt(llama(), loss=losses), flat(position_ids=restarts())
    found = Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(3, keep="best"))(target, batch)
    assert (found.losses > losses(target.forward(batch), batch)).all()
    assert found.deltas["text"].shape == (1, 14, 16)


def test_padding_without_a_mask_is_warned_of_once() -> None:
    target, attack = adapt(llama()), Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(1))
    batch = padded()
    unmasked = {name: value for name, value in batch.items() if name != "attention_mask"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(target, batch)
        attack(target, flat(position_ids=restarts()))
    with pytest.warns(UserWarning, match=r"attention_mask beside padded input_ids, .*padding \(id 0\) .*tokenizer's"):
        attack(target, unmasked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(target, unmasked)


def test_padding_that_ends_texts_too_is_none() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(WORDS | {"eos_token_id": 0}), use_cache=False)).double().eval()
    batch = padded()
    del batch["attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(1))(model, batch)


def test_numbers_of_texts_are_no_mask() -> None:
    batch = flat(attention_mask=torch.tensor([[1] * 4 + [2] * 7 + [3] * 3]))
    with pytest.raises(
        DataError, match=r"attention_mask of 0 and 1, got numbers up to 3; give position_ids that start again"
    ):
        Attack(EmbeddingPerturber(text=Ascent(L2(0.3), step_size=0.3)), PGD(1))(llama(), batch)
