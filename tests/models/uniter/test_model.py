"""UNITER: its size and names, its numbers, what it does not depend on, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_cases import batch, document, tensors
from support.uniter_batches import uniter_batch, without_lengths
from torch import Tensor

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.model import UniterConfig, UniterModel, gather_index, region_mask, text_mask
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA


def tiny(**overrides: Any) -> UniterModel:
    torch.manual_seed(0)
    return UniterModel(UniterConfig.tiny(initializer_range=0.2, **overrides)).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "parameters", "names"),
    [
        pytest.param(lambda: UniterForPretraining(UniterConfig.base()), 112_938_887, 230, id="base-pretraining"),
        pytest.param(lambda: UniterForVQA(UniterConfig.base(), num_answers=3129), 115_892_281, 216, id="base-vqa"),
        pytest.param(lambda: UniterForPretraining(UniterConfig.large()), 340_524_935, 422, id="large-pretraining"),
    ],
)
def test_parameters_are_as_many_as_published(build: Callable[[], torch.nn.Module], parameters: int, names: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == names


@pytest.mark.parametrize(
    ("folder", "file", "build"),
    [
        pytest.param("villa_vqa", "uniter_vqa", lambda config: UniterForVQA(config, num_answers=17), id="vqa"),
        pytest.param("uniter_pretrain", "uniter_pretrain", UniterForPretraining, id="pretraining"),
    ],
)
def test_names_and_shapes_are_the_published_ones(folder: str, file: str, build: Callable[..., torch.nn.Module]) -> None:
    ours = build(UniterConfig(**document(folder, "config"))).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in tensors(folder, file).items()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_are_the_published_ones(attention: str) -> None:
    config = document("villa_vqa", "config") | {"attn_implementation": attention}
    model = UniterForVQA(UniterConfig(**config), num_answers=17).double()
    model.load_state_dict(tensors("villa_vqa", "uniter_vqa"))
    golden = tensors("villa_vqa", "villa_image_l2")["clean_logits"]
    torch.testing.assert_close(model(**batch("villa_vqa")).logits, golden, rtol=1e-11, atol=1e-11)


def test_places_in_the_sequence_are_those_of_the_plain_concatenation() -> None:
    model, inputs = tiny(), uniter_batch()
    longest, most = inputs["input_ids"].shape[1], inputs["img_feat"].shape[1]
    text, regions = text_mask(inputs), region_mask(inputs)
    plain = inputs | {
        "gather_index": torch.arange(longest + most).expand(len(text), -1),
        "attn_masks": torch.cat([text, regions], 1).long(),
    }
    compact, wide = model(**inputs).last_hidden_state, model(**plain).last_hidden_state
    for row, (tokens, boxes) in enumerate(zip(text.sum(1), regions.sum(1), strict=True)):
        apart = torch.cat([wide[row, :tokens], wide[row, longest : longest + boxes]])
        assert (compact[row, : tokens + boxes] - apart).abs().max() < 1e-12


@pytest.mark.parametrize("more", ["more_text", "more_regions", "more_places"])
def test_padding_changes_nothing(more: str) -> None:
    model, options = tiny(), {more: 5}
    found, expected = model(**uniter_batch(**options)), model(**uniter_batch())  # type: ignore[arg-type]
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-12, atol=1e-12)
    places = expected.last_hidden_state.shape[1]
    real = uniter_batch()["attn_masks"].bool()
    torch.testing.assert_close(
        found.last_hidden_state[:, :places][real], expected.last_hidden_state[real], rtol=1e-12, atol=1e-12
    )


def test_what_stands_in_padding_changes_nothing() -> None:
    model, inputs = tiny(), uniter_batch()
    noisy = inputs | {
        "input_ids": inputs["input_ids"].where(text_mask(inputs), 5),
        "img_feat": inputs["img_feat"].where(region_mask(inputs)[..., None], 1e3),
    }
    assert torch.equal(model(**noisy).pooler_output, model(**inputs).pooler_output)


def test_rows_do_not_know_of_each_other() -> None:
    model = tiny()
    together = model(**uniter_batch()).pooler_output
    for row, (tokens, regions) in enumerate(zip((9, 6, 3, 8), (5, 7, 4, 1), strict=True)):
        alone = model(**uniter_batch([tokens], [regions])).pooler_output
        torch.testing.assert_close(together[row], alone[0], rtol=1e-12, atol=1e-12)


def test_positions_count_from_zero_unless_given() -> None:
    model, inputs = tiny(), uniter_batch()
    expected = model(**inputs).pooler_output
    shifted = model(**inputs | {"position_ids": inputs["position_ids"] + 1}).pooler_output
    inputs.pop("position_ids")
    assert torch.equal(model(**inputs).pooler_output, expected)
    assert not torch.equal(shifted, expected)


def test_types_are_zero_for_text_and_one_for_regions_unless_given() -> None:
    model, inputs = tiny(), uniter_batch()
    text, image = torch.zeros_like(inputs["input_ids"]), torch.ones(inputs["img_feat"].shape[:2], dtype=torch.long)
    expected = model(**inputs).pooler_output
    assert torch.equal(model(**inputs, txt_type_ids=text, img_type_ids=image).pooler_output, expected)
    assert not torch.equal(model(**inputs, txt_type_ids=text + 1, img_type_ids=image).pooler_output, expected)
    assert not torch.equal(model(**inputs, txt_type_ids=text, img_type_ids=image - 1).pooler_output, expected)


def test_a_masked_region_gets_the_mask_embedding_and_no_parameter_changes() -> None:
    model, inputs = tiny(), uniter_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masked = torch.zeros(inputs["img_feat"].shape[:2], dtype=torch.bool)
    masked[0, 1] = masked[1, 3] = True
    by_hand = inputs["img_feat"].clone()
    by_hand[masked] += model.img_embeddings.mask_embedding.weight[1]
    found = model(**inputs, img_masks=masked).pooler_output
    torch.testing.assert_close(found, model(**inputs | {"img_feat": by_hand}).pooler_output, rtol=1e-13, atol=1e-13)
    found.sum().backward()
    gradient = model.img_embeddings.mask_embedding.weight.grad
    assert gradient is not None
    assert gradient[1].any()
    assert not gradient[0].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recomputed_layers_give_the_same_gradients() -> None:
    inputs, kept, recomputed = uniter_batch(), tiny().train(), tiny().train()
    recomputed.gradient_checkpointing_enable()
    calls: list[object] = []
    for model in (kept, recomputed):
        handle = model.encoder.layer[1].attention.register_forward_hook(lambda *_, model=model: calls.append(model))
        torch.manual_seed(3)
        model(**inputs).pooler_output.square().sum().backward()
        handle.remove()
    assert calls == [kept, recomputed, recomputed]
    for name, parameter in kept.named_parameters():
        if parameter.grad is not None:
            other = recomputed.get_parameter(name).grad
            assert other is not None
            torch.testing.assert_close(other, parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_in_bfloat16_takes_features_in_float32(attention: str) -> None:
    model = tiny(attn_implementation=attention).bfloat16()
    output = model(**uniter_batch(dtype=torch.float32))
    assert output.pooler_output.dtype == torch.bfloat16
    assert output.pooler_output.isfinite().all()


def test_every_trainable_parameter_of_vqa_gets_a_gradient() -> None:
    model, inputs = UniterForVQA(UniterConfig.tiny(), num_answers=5).double(), uniter_batch()
    model(**inputs, targets=torch.rand(4, 5, dtype=torch.float64)).loss.mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_weights_start_as_published() -> None:
    model = UniterForPretraining(UniterConfig.tiny(vocab_size=2000, hidden_size=64, initializer_range=0.02))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            assert 0.015 < module.weight.std() < 0.025, name
            assert module.weight[0].any(), name  # padding rows are drawn too
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm) and module.bias is not None:
            assert not module.bias.any(), name


Spoil = Callable[[dict[str, Tensor]], dict[str, Any]]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        pytest.param(
            lambda b: {"img_feat": b["img_feat"][..., :39]}, ShapeError, r"img_feat .* 40\), got .* 39\)", id="width"
        ),
        pytest.param(
            lambda b: {"img_feat": b["img_feat"].long()}, DataError, r"img_feat .*torch\.int64", id="whole-features"
        ),
        pytest.param(lambda b: {"img_feat": b["img_feat"][0]}, ShapeError, "img_feat", id="no-batch-axis"),
        pytest.param(
            lambda b: {"img_pos_feat": b["img_pos_feat"][..., :4]}, ShapeError, "img_pos_feat", id="four-boxes"
        ),
        pytest.param(
            lambda b: {"img_pos_feat": b["img_pos_feat"][:, 1:]}, ShapeError, "img_pos_feat", id="fewer-boxes"
        ),
        pytest.param(
            lambda b: {"input_ids": b["input_ids"].double()}, DataError, r"input_ids .*torch\.float64", id="ids"
        ),
        pytest.param(lambda b: {"input_ids": b["input_ids"][0]}, ShapeError, "input_ids", id="ids-of-one-row"),
        pytest.param(lambda b: {"gather_index": b["gather_index"][:, 1:]}, ShapeError, "gather_index", id="places"),
        pytest.param(lambda b: {"attn_masks": b["attn_masks"][:2]}, ShapeError, "attn_masks", id="rows"),
        pytest.param(lambda b: {"img_masks": b["attn_masks"].bool()}, ShapeError, "img_masks", id="img-masks"),
        *[
            pytest.param(lambda b, name=name: {name: None}, DataError, f"'{name}'", id=f"without-{name}")
            for name in ("input_ids", "img_feat", "img_pos_feat", "attn_masks", "gather_index")
        ],
    ],
)
def test_fields_that_do_not_fit_are_refused(spoil: Spoil, error: type[Exception], message: str) -> None:
    inputs = uniter_batch()
    with pytest.raises(error, match=message):
        tiny()(**inputs | spoil(inputs))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_ids", 97, r"input_ids in 0\.\.96, by vocab_size = 97, got 97; was the batch made for another"),
        ("input_ids", -1, r"got -1"),
        ("txt_type_ids", 2, r"txt_type_ids in 0\.\.1, by type_vocab_size = 2, got 2"),
        ("img_type_ids", 3, r"img_type_ids in 0\.\.1, by type_vocab_size = 2, got 3"),
        ("gather_index", 16, r"gather_index in 0\.\.15, by L \+ R = 16, got 16"),
    ],
)
def test_words_types_and_places_that_are_not_there_are_refused(field: str, value: int, message: str) -> None:
    """As of a batch of VCR, which has words and types of its own, given to another task's model."""
    inputs = uniter_batch()
    types = {"txt_type_ids": inputs["input_ids"] * 0, "img_type_ids": inputs["img_feat"][..., 0].long() * 0}
    inputs |= types
    inputs[field][1, 2] = value
    with pytest.raises(DataError, match=message):
        tiny()(**inputs)


def test_a_text_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"at most max_position_embeddings = 32 tokens, got 33"):
        tiny()(**uniter_batch([33], [2]))


lengths = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 7)), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(0, 3))
def test_gather_index_puts_regions_right_after_the_words(pairs: list[tuple[int, int]], more: int) -> None:
    words, boxes = (torch.tensor(column) for column in zip(*pairs, strict=True))
    width = int(words.max()) + more
    index = gather_index(words, boxes, width)
    assert index.shape == (len(pairs), max(tokens + regions for tokens, regions in pairs))
    for row, (tokens, regions) in enumerate(pairs):
        assert index[row, : tokens + regions].tolist() == [*range(tokens), *range(width, width + regions)]
    assert index.max() < width + max(int(boxes.max()), 1)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_masks_are_the_same_with_and_without_lengths(
    pairs: list[tuple[int, int]], text: int, regions: int, places: int
) -> None:
    words, boxes = zip(*pairs, strict=True)
    inputs = uniter_batch(words, boxes, more_text=text, more_regions=regions, more_places=places)
    bare = without_lengths(inputs)
    assert torch.equal(text_mask(bare), text_mask(inputs))
    assert torch.equal(region_mask(bare), region_mask(inputs))
    assert text_mask(bare).sum(1).tolist() == list(words)


@pytest.mark.parametrize("name", ["villa_vqa", "uniter_pretrain"])
def test_gather_index_is_the_published_one(name: str) -> None:
    inputs = batch(name)
    found = gather_index(inputs["txt_lens"], inputs["num_bbs"], inputs["input_ids"].shape[1])
    assert torch.equal(found, inputs["gather_index"])


def test_gather_index_of_no_rows_is_empty() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert gather_index(none, none, 4).shape == (0, 0)


def test_gather_index_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match=r"at most max_txt_len = 4 tokens, got 5"):
        gather_index(torch.tensor([5]), torch.tensor([1]), 4)
    with pytest.raises(ShapeError, match=r"got \(1,\) and \(2,\)"):
        gather_index(torch.tensor([5]), torch.tensor([1, 2]), 5)


def test_the_official_json_is_read_with_overrides(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    file = tmp_path / "uniter-large.json"
    file.write_text(json.dumps(sizes | {"vocab_size": 28996, "hidden_act": "gelu", "initializer_range": 0.02}))
    config = UniterConfig.from_json_file(file, img_dim=40, vocab_size=97, attn_implementation="eager")
    assert config.to_dict() == UniterConfig.large(img_dim=40, vocab_size=97).to_dict()
    assert config._attn_implementation == "eager"
    assert config.layer_norm_eps == 1e-12


@pytest.mark.parametrize("text", [None, "{", "[1]"], ids=["missing", "cut-short", "a-list"])
def test_a_configuration_that_is_not_one_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        UniterConfig.from_json_file(file)


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 5},
        {"img_dim": 0},
        {"img_dim": 2.5},
        {"itm_ot_lambda": -0.1},
        {"attn_implementation": "flash"},
    ],
    ids=str,
)
def test_sizes_that_make_no_model_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        UniterConfig.tiny(**options)
