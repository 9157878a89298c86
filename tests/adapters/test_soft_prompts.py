"""Soft prompts: a perturbation at inserted positions is, in float64, an embedding put there by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from advvl import (
    L2,
    PGD,
    Ascent,
    Attack,
    EmbeddingPerturber,
    Normal,
    PassTrace,
    Site,
    SoftPrompt,
    UniversalPerturber,
    adapt,
    freelb,
)
from advvl.errors import ConfigurationError, DataError, ShapeError, SiteError

WIDTH, TOKEN, COUNT = 16, 3, 2
TEXTS = [([11, 12, 13], [21, 22]), ([14], [23, 24, 25]), ([15, 16], [26])]  # prompts and answers
PLACES = ("start", "end", "before_labels")


def llama() -> LlamaForCausalLM:
    """A Llama in float64 throughout: its own norms round to fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
    model.model.norm = nn.RMSNorm(WIDTH)
    return model.double().eval()


def losses(outputs: Any, batch: Any) -> Tensor:
    """The sum of each row's cross-entropies, in float64: the model's own loss is in fp32."""
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(1)


def loss_by_hand(model: LlamaForCausalLM, row: int, vectors: Tensor, at: str) -> Tensor:
    given = by_hand(model, row, vectors, at)
    return losses(model(inputs_embeds=given["inputs_embeds"]), given)[0]


def padded(rows: list[list[int]], fill: int, side: str, length: int) -> Tensor:
    return torch.tensor(
        [
            [*row, *[fill] * (length - len(row))] if side == "right" else [*[fill] * (length - len(row)), *row]
            for row in rows
        ]
    )


def texts(side: str, *, length: int = 6, answers: bool = True) -> dict[str, Tensor]:
    rows = [[*prompt, *(answer if answers else [])] for prompt, answer in TEXTS]
    batch = {
        "input_ids": padded(rows, 0, side, length),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, side, length),
        "position_ids": padded([list(range(len(row))) for row in rows], 0, side, length),
    }
    if answers:
        labels = [[-100] * len(prompt) + answer for prompt, answer in TEXTS]
        batch["labels"] = padded(labels, -100, side, length)
    return batch


def by_hand(model: LlamaForCausalLM, row: int, vectors: Tensor, at: str, *, answers: bool = True) -> dict[str, Tensor]:
    """One text without padding, the embedding of the token plus a vector each put where they belong."""
    prompt, answer = TEXTS[row]
    embed = model.get_input_embeddings()
    asked, said = embed(torch.tensor(prompt)), embed(torch.tensor(answer if answers else [], dtype=torch.long))
    inserted = embed(torch.tensor([TOKEN] * COUNT)) + vectors
    parts = {
        "start": ([inserted, asked, said], [-100] * (COUNT + len(prompt)) + answer),
        "before_labels": ([asked, inserted, said], [-100] * (COUNT + len(prompt)) + answer),
        "end": ([asked, said, inserted], [-100] * len(prompt) + answer + [-100] * COUNT),
    }
    embedded, labels = parts[at]
    given = {"inputs_embeds": torch.cat(embedded)[None]}
    return {**given, "labels": torch.tensor(labels)[None]} if answers else given


def sites(prompt: SoftPrompt, **options: Any) -> dict[str, Site]:
    return {"prompt": Site("model.embed_tokens", mask=prompt.mask, **options)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("at", PLACES)
def test_inserted_vectors_are_embeddings_of_a_longer_text(at: Any, side: str) -> None:
    model, prompt = llama(), SoftPrompt(COUNT, token=TOKEN, at=at)
    batch = prompt.insert(texts(side))
    vectors = torch.randn(3, COUNT, WIDTH, dtype=torch.float64)
    target = adapt(model, sites(prompt))
    with target.inject({"prompt": prompt.place(vectors, batch)}):
        outputs = model(**batch)
    real = batch["attention_mask"].bool()
    for row in range(3):
        expected = model(inputs_embeds=by_hand(model, row, vectors[row], at)["inputs_embeds"])
        torch.testing.assert_close(outputs.logits[row][real[row]], expected.logits[0], rtol=0, atol=1e-12)
        ours = losses(outputs, batch)[row]
        torch.testing.assert_close(ours, loss_by_hand(model, row, vectors[row], at), rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", PLACES)
def test_labels_are_those_of_the_same_tokens(at: Any) -> None:
    for side in ("left", "right"):
        before, after = texts(side), SoftPrompt(COUNT, token=TOKEN, at=at).insert(texts(side))
        for name in ("input_ids", "labels"):
            predicted = after["labels"] != -100
            assert after[name][predicted].tolist() == before[name][before["labels"] != -100].tolist()
        assert (after["labels"][after["input_ids"] == TOKEN] == -100).all()
        assert before["input_ids"].tolist() == texts(side)["input_ids"].tolist()  # the batch given is as it was


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("at", ["start", "before_labels"])
def test_an_attack_moves_the_inserted_positions_alone_by_their_own_gradient(at: Any, side: str) -> None:
    model, prompt = llama(), SoftPrompt(COUNT, token=TOKEN, at=at)
    batch = prompt.insert(texts(side))
    mask = prompt.mask(batch)
    assert mask.sum(1).tolist() == [COUNT] * 3
    attack = Attack(EmbeddingPerturber(prompt=Ascent(L2(), step_size=0.1)), PGD(1), loss=losses)
    found = attack(adapt(model, sites(prompt)), batch).deltas["prompt"]
    assert not found[~mask].any()
    for row in range(3):
        vectors = torch.zeros(COUNT, WIDTH, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss_by_hand(model, row, vectors, at), vectors)
        torch.testing.assert_close(found[row][mask[row]], 0.1 * gradient / gradient.norm(), rtol=0, atol=1e-12)


def test_an_attack_after_the_answer_says_that_nothing_depends_on_it() -> None:
    prompt = SoftPrompt(COUNT, token=TOKEN, at="end")
    attack = Attack(EmbeddingPerturber(prompt=Ascent(L2(), step_size=0.1)), PGD(1), loss=losses)
    with pytest.raises(SiteError, match="to depend on the real positions of 'prompt'"):
        attack(adapt(llama(), sites(prompt)), prompt.insert(texts("right")))


def test_training_is_that_of_texts_with_the_vectors_in_them() -> None:
    prompt = SoftPrompt(COUNT, token=TOKEN)
    batch = prompt.insert(texts("right"))
    ours, theirs = llama(), llama()
    traces: list[PassTrace] = []
    target = adapt(ours, sites(prompt), loss=losses)
    freelb(step_sizes={"prompt": 0.1}, steps=2).step(target, batch, trace=traces.append)
    for seen in traces:
        vectors = seen.deltas["prompt"][prompt.mask(batch)].view(3, COUNT, WIDTH)
        rows = [loss_by_hand(theirs, row, vectors[row], "start") for row in range(3)]
        (torch.stack(rows).mean() / 2).backward()
    for (name, ours_of), theirs_of in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_of.grad, theirs_of.grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_universal_soft_prompt_serves_other_texts(side: str) -> None:
    """Inserted positions share columns where texts are padded on the other side."""
    at: Any = "start" if side == "right" else "end"
    model, prompt = llama(), SoftPrompt(COUNT, token=TOKEN, at=at)
    batch = prompt.insert(texts(side))
    columns = prompt.mask(batch).any(0)
    assert int(columns.sum()) == COUNT
    ascent = Ascent(L2(), step_size=0.1, start=Normal(0.1))
    attack = Attack(
        UniversalPerturber(prompt=ascent), PGD(3), loss=lambda outputs, batch: outputs.logits.square().mean((1, 2))
    )
    target = adapt(model, sites(prompt))
    found = attack(target, batch)
    vectors = found.deltas["prompt"][0, columns]
    assert vectors.abs().sum(1).all()
    with target.inject({"prompt": prompt.place(vectors, batch)}):
        torch.testing.assert_close(found.losses, model(**batch).logits.square().mean((1, 2)), rtol=0, atol=1e-12)

    longer = prompt.insert(texts(side, length=9))
    with target.inject({"prompt": prompt.place(vectors, longer)}):
        outputs = model(**longer)
    for row in range(3):
        expected = model(**by_hand(model, row, vectors, at)).logits[0]
        real = longer["attention_mask"][row].bool()
        torch.testing.assert_close(outputs.logits[row][real], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", ["start", "end"])
def test_generation_goes_on_from_the_longer_text(at: Any) -> None:
    model, prompt = llama(), SoftPrompt(COUNT, token=TOKEN, at=at)
    asked = texts("left", length=4, answers=False)
    del asked["position_ids"]
    batch = prompt.insert(asked)
    vectors = torch.randn(COUNT, WIDTH, dtype=torch.float64)
    target = adapt(model, sites(prompt, firing=0))
    with target.inject({"prompt": prompt.place(vectors, batch)}):
        said = model.generate(**batch, max_new_tokens=4, do_sample=False)
    for row in range(3):
        given = by_hand(model, row, vectors, at, answers=False)
        expected = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert said[row, batch["input_ids"].shape[1] :].tolist() == expected[0].tolist()


def test_other_fields_follow_or_stay() -> None:
    prompt = SoftPrompt(2, token=TOKEN, at="end")
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "token_type_ids": torch.tensor([[0, 0, 1], [0, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 2]]),
        "labels": torch.tensor([0, 1]),
        "pixel_values": torch.zeros(2, 3, 4, 4),
        "use_cache": False,
    }
    found = prompt.insert(batch)
    assert found["input_ids"].tolist() == [[5, 6, 7, 3, 3], [5, 6, 3, 3, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert found["token_type_ids"].tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for name in ("labels", "pixel_values", "use_cache"):
        assert found[name] is batch[name]
    scores = torch.rand(2, 3)
    assert prompt.insert({**batch, "labels": scores})["labels"] is scores
    types = prompt.insert({**batch, "token_type_ids": torch.tensor([[0, 1, 1]])})["token_type_ids"]
    assert types.tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert prompt.insert({"input_ids": torch.tensor([[5, 6]])})["input_ids"].tolist() == [[5, 6, 3, 3]]


def test_inserted_positions_are_words_among_images() -> None:
    """Qwen2.5-VL's processor says of each token what it stands for: 0 a word, 1 an image, 2 a video."""
    prompt = SoftPrompt(2, token=TOKEN, at="end")
    batch = {
        "input_ids": torch.tensor([[5, 8, 8, 6], [8, 5, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]),
        "pixel_values": torch.zeros(12, 24),
        "image_grid_thw": torch.tensor([[1, 4, 2], [1, 2, 2]]),
    }
    found = prompt.insert(batch)
    assert found["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert found["image_grid_thw"] is batch["image_grid_thw"]
    before = replace(prompt, at="start").insert({**batch, "mm_token_type_ids": torch.tensor([[1, 1, 0, 0]] * 2)})
    assert before["mm_token_type_ids"][0].tolist() == [0, 0, 1, 1, 0, 0]


def test_padding_may_have_the_token_of_inserted_positions() -> None:
    prompt = SoftPrompt(1, token=0)
    batch = prompt.insert(
        {"input_ids": torch.tensor([[5, 6], [5, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    )
    assert prompt.mask(batch).tolist() == [[True, False, False], [True, False, False]]


IDS, ONES = torch.tensor([[5, 6, 7], [5, 6, 7]]), torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": torch.tensor([[5, TOKEN, 7]])}, "expected texts without token 3"),
        ({"input_ids": IDS.float()}, r"expected input_ids \(B, T\)"),
        ({"input_ids": IDS[None]}, r"expected input_ids \(B, T\)"),
        ({"input_ids": IDS > 5}, r"expected input_ids \(B, T\) of whole numbers, got \(2, 3\), torch.bool"),
        ({"input_ids": IDS[:, :0]}, r"expected input_ids \(B, T\) of whole numbers, got \(2, 0\)"),
        ({"token_type_ids": ONES[:, :2]}, r"token_type_ids \(2, 3\) or \(1, 3\), got \(2, 2\)"),
        ({"token_type_ids": [[0, 0, 0]]}, r"token_type_ids \(2, 3\) or \(1, 3\), got list"),
        ({"position_ids": torch.arange(3).expand(3, 3)}, r"position_ids \(2, 3\) or \(1, 3\), got \(3, 3\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 4)}, "got 'inputs_embeds', which cannot be lengthened"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6])}, "got 'cu_seq_lens_q'"),
        ({"gather_index": torch.arange(5).expand(2, 5)}, "got 'gather_index', which places words beside regions"),
        ({"attn_masks": torch.ones(2, 5)}, "got 'attn_masks', which places"),
        ({"txt_lens": torch.tensor([3, 3])}, "got 'txt_lens', which places"),
        ({"seq_idx": ONES}, "got 'seq_idx'"),
        ({"position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])}, "some that start again"),
        ({"position_ids": torch.zeros(3, 2, 3)}, r"expected position_ids \(2, 3\)"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, "attention_mask of 0 and 1"),
        ({"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 1]])}, "attention_mask of 0 and 1"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "one text without gaps in each row"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "one text without gaps in each row"),
        ({"labels": torch.tensor([[1], [2]])}, r"labels of input_ids' shape \(2, 3\), got \(2, 1\)"),
        ({"special_tokens_mask": ONES}, r"got 'special_tokens_mask' with an entry per token of \(2, 3\)"),
        ({"bbox": torch.zeros(2, 3, 4, dtype=torch.long)}, "got 'bbox' with an entry per token"),
        ({"word_ids": [[0, 0, 1], [0, 1, 2]]}, "got 'word_ids' with an entry per token"),
        ({"offsets": ONES.unbind()}, "got 'offsets' with an entry per token"),
        ({"labels": [[5, 6, 7], [5, 6, 7]]}, "got 'labels' with an entry per token"),
        ({"labels": torch.zeros(2, 3, 9)}, "got 'labels' with an entry per token"),
    ],
)
def test_what_cannot_be_lengthened_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SoftPrompt(2, token=TOKEN).insert({"input_ids": IDS, **fields})


@pytest.mark.parametrize(
    "labels",
    [None, torch.tensor([0, 1]), torch.tensor([[-100, 6, 7], [7, -100, -100]]), torch.rand(2, 3)],
    ids=["none", "classes", "in padding", "scores"],
)
def test_a_place_before_labels_needs_labels_of_real_words(labels: Any) -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(DataError, match="expected a label other than -100 at a real position of each row"):
        SoftPrompt(2, token=TOKEN, at="before_labels").insert(
            {"input_ids": IDS, "attention_mask": mask, "labels": labels}
        )


def test_labels_of_padding_are_no_place() -> None:
    """With labels that are the ids, padding and all, the prompt is before each text, as without padding."""
    model, prompt = llama(), SoftPrompt(COUNT, token=TOKEN, at="before_labels")
    batch = texts("left")
    batch = prompt.insert({**batch, "labels": batch["input_ids"].clone()})
    vectors = torch.randn(3, COUNT, WIDTH, dtype=torch.float64)
    with adapt(model, sites(prompt)).inject({"prompt": prompt.place(vectors, batch)}):
        outputs = model(**batch)
    for row in range(3):
        expected = model(inputs_embeds=by_hand(model, row, vectors[row], "start")["inputs_embeds"]).logits[0]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(outputs.logits[row][real], expected, rtol=0, atol=1e-12)


def test_without_a_mask_every_position_is_text() -> None:
    found = SoftPrompt(1, token=TOKEN, at="end").insert({"input_ids": torch.tensor([[5, 6, 7], [5, 0, 0]])})
    assert found["input_ids"].tolist() == [[5, 6, 7, 3], [5, 0, 0, 3]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 3, 4)}, r"expected input_ids \(B, T\) of whole numbers, got NoneType"),
        ([IDS], "a mapping with input_ids"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
            r"input_ids' shape \(2, 3\), got \(2, 1, 3, 3\)",
        ),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"input_ids' shape \(2, 3\), got \(2, 4\)"),
    ],
)
def test_the_mask_of_a_batch_without_texts_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SoftPrompt(2, token=TOKEN).mask(batch)


def test_vectors_and_arguments_that_make_no_sense_are_refused() -> None:
    prompt = SoftPrompt(2, token=TOKEN)
    batch = prompt.insert({"input_ids": IDS})
    for shape in ((3, 4), (2, 3, 4), (1, 2, 4), (4,)):
        with pytest.raises(ShapeError, match=r"expected vectors \(k, D\)"):
            prompt.place(torch.zeros(shape), batch)
    with pytest.raises(ShapeError, match="got list"):
        prompt.place([[0.0] * 4] * 2, batch)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"expected 2 inserted positions in each row, got \[0, 0\]"):
        prompt.place(torch.zeros(2, 4), {"input_ids": IDS})
    for arguments in ({"count": 0}, {"token": -1}, {"token": 1.5}, {"at": "middle"}):
        with pytest.raises(ConfigurationError, match=next(iter(arguments))):
            SoftPrompt(**{"count": 2, "token": 3, **arguments})
    with pytest.raises(DataError, match="a mapping with input_ids"):
        prompt.insert([IDS])  # type: ignore[arg-type]
