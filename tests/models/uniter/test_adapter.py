"""UNITER's sites: where they are, what is masked, what is passed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.uniter_batches import uniter_batch, without_lengths
from support.wrappers import Wrapper
from torch import Tensor, nn

from advvl import L2, AdversarialTraining, Ascent, EmbeddingPerturber, FreeLB, PassTrace, SymmetricKL, Uniform, adapt
from advvl.errors import DataError, SiteError
from advvl.models.uniter.adapter import uniter_adapter
from advvl.models.uniter.model import UniterConfig, UniterModel, region_mask, text_mask
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA


def vqa() -> UniterForVQA:
    torch.manual_seed(0)
    return UniterForVQA(UniterConfig.tiny(initializer_range=0.2), num_answers=5).double().eval()


def vqa_batch(**options: Any) -> dict[str, Tensor]:
    return uniter_batch(**options) | {"targets": torch.linspace(0, 1, 20, dtype=torch.float64).view(4, 5)}


def deltas(method: AdversarialTraining, model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    passes: list[PassTrace] = []
    method.step(adapt(model), batch, trace=passes.append)
    return [dict(seen.deltas) for seen in passes if seen.deltas]


VILLA = AdversarialTraining(
    EmbeddingPerturber(text=Ascent(L2(), step_size=0.1), image=Ascent(L2(), step_size=0.1)),
    FreeLB(3),
    SymmetricKL(weight=1.5),
)


def test_an_image_delta_is_added_to_the_features() -> None:
    model, batch = vqa(), vqa_batch()
    delta = torch.randn(batch["img_feat"].shape, dtype=torch.float64)
    with adapt(model).inject({"image": delta}):
        found = model(**batch).logits
    expected = model(**batch | {"img_feat": batch["img_feat"] + delta}).logits
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_text_delta_is_added_to_the_word_embeddings() -> None:
    model, batch = vqa(), vqa_batch()
    shift = torch.randn(48, dtype=torch.float64)
    with adapt(model).inject({"text": shift.expand(*batch["input_ids"].shape, 48)}):
        found = model(**batch).logits
    with torch.no_grad():
        model.uniter.embeddings.word_embeddings.weight += shift
    torch.testing.assert_close(found, model(**batch).logits, rtol=1e-12, atol=1e-12)


def test_only_real_positions_move_and_all_of_them_do() -> None:
    batch = vqa_batch(more_text=2, more_regions=3)
    last = deltas(VILLA, vqa(), batch)[-1]
    assert torch.equal(last["text"].any(-1), text_mask(batch))
    assert torch.equal(last["image"].any(-1), region_mask(batch))


@pytest.mark.parametrize("strip", [dict, without_lengths], ids=["with-lengths", "without-lengths"])
def test_a_random_start_leaves_padding_alone(strip: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    random = Ascent(L2(), step_size=0.1, start=Uniform(0.1))
    method = AdversarialTraining(EmbeddingPerturber(text=random, image=random), FreeLB(2))
    batch = vqa_batch(more_text=2, more_regions=3)
    first = deltas(method, vqa(), strip(batch))[0]
    assert torch.equal(first["text"].any(-1), text_mask(batch))
    assert torch.equal(first["image"].any(-1), region_mask(batch))


def test_deltas_are_the_same_with_and_without_lengths() -> None:
    batch = vqa_batch(more_text=2)
    for with_, without in zip(deltas(VILLA, vqa(), batch), deltas(VILLA, vqa(), without_lengths(batch)), strict=True):
        assert all(torch.equal(with_[modality], without[modality]) for modality in ("text", "image"))


def test_fields_that_the_model_does_not_take_are_left_out() -> None:
    model, batch = vqa(), vqa_batch()
    wider = batch | {"question_id": torch.arange(4), "task": "vqa", "img_masks": torch.ones(4, 7, dtype=torch.bool)}
    found = adapt(model).forward(wider)
    assert torch.equal(found.logits, model(**batch).logits)


def test_a_missing_field_is_named() -> None:
    batch = vqa_batch()
    batch.pop("gather_index")
    with pytest.raises(DataError, match="'gather_index'"):
        adapt(vqa()).forward(batch)


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(DataError, match="as a mapping of fields, got tuple"):
        adapt(vqa()).forward(tuple(vqa_batch().values()))


def test_pretraining_on_masked_words_is_perturbed_at_both_sites() -> None:
    torch.manual_seed(0)
    model, batch = UniterForPretraining(UniterConfig.tiny()).double().eval(), uniter_batch()
    labels = torch.full_like(batch["input_ids"], -1)
    labels[:, 1] = batch["input_ids"][:, 1]
    seen = deltas(VILLA, model, batch | {"txt_labels": labels, "task": "mlm"})
    assert len(seen) == 3
    assert all(seen[-1][modality].any() for modality in ("text", "image"))


def test_a_bare_encoder_is_adapted_with_a_loss_of_ones_own() -> None:
    model, batch = UniterModel(UniterConfig.tiny()).double(), uniter_batch()
    method = AdversarialTraining(EmbeddingPerturber(image=Ascent(L2(), step_size=0.1)), FreeLB(2))
    method.step(adapt(model), batch, loss=lambda outputs, _: outputs.pooler_output.square().sum(1))
    assert model.pooler.dense.weight.grad is not None


def test_a_wrapped_model_is_adapted() -> None:
    batch, bare = vqa_batch(), deltas(VILLA, vqa(), vqa_batch())
    for found, expected in zip(deltas(VILLA, Wrapper(vqa(), "module"), batch), bare, strict=True):
        assert all(torch.equal(found[modality], expected[modality]) for modality in ("text", "image"))


@pytest.mark.parametrize("count", [0, 2])
def test_one_uniter_is_expected(count: int) -> None:
    with pytest.raises(SiteError, match=f"expected one UniterModel in ModuleList, got {count}"):
        uniter_adapter(nn.ModuleList(UniterModel(UniterConfig.tiny()) for _ in range(count)))
