"""LXMERT's sites: where they are, what is masked, what is compared, and an NLVR2 batch's two rows an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.lxmert_batches import lxmert_batch, lxmert_config, nlvr2_batch, pretraining_batch, vqa_batch
from support.wrappers import Wrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LxmertForPreTraining, LxmertForQuestionAnswering, LxmertModel

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    PassTrace,
    Site,
    SymmetricKL,
    Uniform,
    adapt,
)
from advvl.errors import ConfigurationError, DataError, ShapeError, SiteError
from advvl.evaluation.robustness import WorstCase, robustness_curve
from advvl.models.lxmert.adapter import lxmert_adapter, lxmert_sites
from advvl.models.lxmert.layout import examples, region_mask, text_mask
from advvl.tasks.lxmert.nlvr2 import LxmertForNLVR2
from advvl.tasks.lxmert.vqa import LxmertForVQA

pytestmark = pytest.mark.slow

Batch = dict[str, Any]


def build(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(lxmert_config(**options)).double().eval()


def answering_batch(**options: Any) -> Batch:
    batch = vqa_batch(**options)
    return batch | {"labels": batch.pop("targets").argmax(1)}


def scores(model: nn.Module, outputs: Any) -> Tensor:
    """What the model predicts, whatever its kind calls it."""
    names = {LxmertForQuestionAnswering: "question_answering_score", LxmertForPreTraining: "prediction_logits"}
    found: Tensor = outputs[names.get(type(model), "pooled_output" if isinstance(model, LxmertModel) else "logits")]
    return found


KINDS: dict[type[nn.Module], Callable[..., Batch]] = {
    LxmertForVQA: vqa_batch,
    LxmertForNLVR2: nlvr2_batch,
    LxmertForQuestionAnswering: answering_batch,
    LxmertForPreTraining: pretraining_batch,
    LxmertModel: lxmert_batch,
}
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
PADDED = pytest.mark.parametrize("kind", [LxmertForVQA, LxmertForNLVR2], ids=lambda kind: kind.__name__)


def shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    """Of the tensors at the sites."""
    rows, tokens = batch["input_ids"].shape
    feats = batch["visual_feats"]
    return {
        "text": (rows if feats.ndim == 3 else 2 * rows, tokens, 16),
        "image": tuple(feats.flatten(0, -3).shape),
    }


def ascents(**options: Any) -> EmbeddingPerturber:
    return EmbeddingPerturber(**{m: Ascent(L2(), step_size=0.1, **options) for m in ("text", "image")})


def deltas(method: AdversarialTraining, model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    passes: list[PassTrace] = []
    method.step(adapt(model), batch, trace=passes.append)
    return [dict(seen.deltas) for seen in passes if seen.deltas]


VILLA = AdversarialTraining(ascents(), FreeLB(3), SymmetricKL(weight=1.5))


@EVERY
def test_an_image_delta_is_added_to_the_features(kind: type[nn.Module]) -> None:
    model, batch = build(kind), KINDS[kind]()
    delta = torch.randn(shapes(batch)["image"], dtype=torch.float64)
    with adapt(model).inject({"image": delta}):
        found = scores(model, model(**batch))
    moved = batch | {"visual_feats": batch["visual_feats"] + delta.view_as(batch["visual_feats"])}
    expected = scores(model, model(**moved))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, scores(model, model(**batch)))


@EVERY
def test_a_text_delta_is_added_to_the_word_embeddings(kind: type[nn.Module]) -> None:
    model, batch = build(kind), KINDS[kind]()
    shift = torch.randn(16, dtype=torch.float64)
    with adapt(model).inject({"text": shift.expand(shapes(batch)["text"])}):
        found = model(**batch)
    words = model.get_input_embeddings()
    with torch.no_grad():
        original = words.weight.clone()
        words.weight = nn.Parameter(original + shift)  # the decoder of pre-training keeps the old ones
    torch.testing.assert_close(scores(model, found), scores(model, model(**batch)), rtol=1e-11, atol=1e-11)


def test_a_text_delta_is_one_of_the_inputs_embeds() -> None:
    model, batch = build(LxmertForQuestionAnswering), answering_batch()
    delta = torch.randn(shapes(batch)["text"], dtype=torch.float64)
    with adapt(model).inject({"text": delta}):
        found = model(**batch).question_answering_score
    embedded = model.lxmert.embeddings.word_embeddings(batch.pop("input_ids")) + delta
    assert torch.equal(found, model(**batch, inputs_embeds=embedded).question_answering_score)


@PADDED
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no-masks"])
def test_real_positions_move_and_no_others(kind: type[nn.Module], masks: bool) -> None:
    batch = KINDS[kind](more_text=2, more_regions=1)
    if not masks:
        del batch["attention_mask"], batch["visual_attention_mask"]
    last = deltas(VILLA, build(kind), batch)[-1]
    for modality, read in (("text", text_mask), ("image", region_mask)):
        mask = read(batch).bool()
        assert torch.equal(last[modality].any(-1), mask)
        assert mask.shape == shapes(batch)[modality][:2]
        assert bool(mask.all()) is not masks


@PADDED
def test_a_random_start_leaves_padding_alone(kind: type[nn.Module]) -> None:
    batch = KINDS[kind](more_text=2, more_regions=1)
    first = deltas(AdversarialTraining(ascents(start=Uniform(0.1)), FreeLB(2)), build(kind), batch)[0]
    assert torch.equal(first["text"].any(-1), text_mask(batch).bool())
    assert torch.equal(first["image"].any(-1), region_mask(batch).bool())


@PADDED
def test_what_the_masks_leave_out_does_not_matter(kind: type[nn.Module]) -> None:
    model, batch = build(kind), KINDS[kind](more_text=2, more_regions=1)
    clean = model(**batch).logits
    for modality, read in (("text", text_mask), ("image", region_mask)):
        beyond = 100.0 * ~read(batch).bool().unsqueeze(-1).expand(shapes(batch)[modality])
        with adapt(model).inject({modality: beyond.double()}):
            assert torch.equal(model(**batch).logits, clean)


def test_both_images_of_an_example_follow_each_other_and_its_sentence_moves_twice() -> None:
    model, batch = build(LxmertForNLVR2), nlvr2_batch()
    last = deltas(VILLA, model, batch)[-1]
    assert not any(torch.equal(*pair) for pair in last["text"].view(3, 2, *last["text"].shape[1:]))
    first, second = (torch.zeros_like(batch["visual_feats"]) for _ in range(2))
    first[1, 0], second[1, 1] = 1.0, 1.0
    for row, change in ((2, first), (3, second)):
        delta = torch.zeros(shapes(batch)["image"], dtype=torch.float64)
        delta[row] = 1.0
        with adapt(model).inject({"image": delta}):
            found = model(**batch).logits
        expected = model(**batch | {"visual_feats": batch["visual_feats"] + change}).logits
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_norm_of_a_pairs_perturbation_is_of_each_row() -> None:
    report = VILLA.step(adapt(build(LxmertForNLVR2)), nlvr2_batch())
    assert report.delta_norms["text"].shape == (6,)
    last = deltas(VILLA, build(LxmertForNLVR2), nlvr2_batch())[1]  # after one move
    torch.testing.assert_close(last["text"].flatten(1).norm(dim=1), torch.full((6,), 0.1).double())


def test_embeddings_given_leave_the_text_site_out() -> None:
    model, batch = build(LxmertForQuestionAnswering), answering_batch()
    batch["inputs_embeds"] = model.lxmert.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    image = AdversarialTraining(EmbeddingPerturber(image=Ascent(L2(), step_size=0.1)), FreeLB(2))
    image.step(adapt(model), batch)
    with pytest.raises(SiteError, match="inputs_embeds"):
        VILLA.step(adapt(model), batch)
    batch = vqa_batch() | {"inputs_embeds": batch["inputs_embeds"]}
    with pytest.raises(DataError, match="expected input_ids for LxmertForVQA, got inputs_embeds"):
        image.step(adapt(build(LxmertForVQA)), batch)


def test_fields_that_the_model_does_not_take_are_left_out() -> None:
    model, batch = build(LxmertForVQA), vqa_batch()
    found = adapt(model).forward(batch | {"question_id": torch.arange(3), "sent": ["a", "b", "c"]})
    assert torch.equal(found.logits, model(**batch).logits)


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(DataError, match=r"as a mapping of fields, got tuple; give .* LxmertForVQA.forward has"):
        adapt(build(LxmertForVQA)).forward(tuple(vqa_batch().values()))


def penalties(target: Adapter, batch: Batch) -> list[Tensor]:
    passes: list[PassTrace] = []
    VILLA.step(target, batch, trace=passes.append)
    return [seen.regularization for seen in passes if seen.regularization is not None]


def test_of_pretraining_masked_words_are_compared() -> None:
    model, batch = build(LxmertForPreTraining), pretraining_batch()
    shift = torch.randn(shapes(batch)["text"], dtype=torch.float64)
    clean = model(**batch).prediction_logits
    with adapt(model).inject({"text": shift}):
        moved = model(**batch).prediction_logits
    target, masked = adapt(model), batch["labels"] != -100
    assert masked.sum() == 3
    found = SymmetricKL()(clean, moved, target.positions(batch))
    torch.testing.assert_close(found, SymmetricKL()(clean[masked], moved[masked]))
    assert penalties(target, batch)[-1] > 0


def test_pretraining_without_masked_words_says_what_to_compare_instead() -> None:
    model, batch = build(LxmertForPreTraining), pretraining_batch()
    del batch["labels"]
    with pytest.raises(ConfigurationError, match=r"give them, or pass logits=…; see docs/errors\.md#masked-words"):
        VILLA.step(adapt(model), batch)
    target = adapt(model, lxmert_sites(model), logits=lambda outputs: outputs.cross_relationship_score)
    assert penalties(target, batch)[-1] > 0


def test_a_bare_encoder_needs_logits_and_a_loss_of_ones_own() -> None:
    model, batch = build(LxmertModel), lxmert_batch()
    with pytest.raises(ConfigurationError, match="expected outputs with a loss, got LxmertModelOutput"):
        AdversarialTraining(ascents(), FreeLB(2)).step(adapt(model), batch)
    with pytest.raises(ConfigurationError, match="expected outputs with logits to compare, got LxmertModelOutput"):
        VILLA.step(adapt(model), batch, loss=lambda outputs, _: outputs.pooled_output.square().sum(1))
    target = adapt(
        model,
        lxmert_sites(model),
        logits=lambda outputs: outputs.pooled_output,
        loss=lambda outputs, _: outputs.pooled_output.square().sum(1),
    )
    assert penalties(target, batch)[-1] > 0


def judged(outputs: Any, batch: Batch) -> Tensor:
    return outputs.logits.argmax(1) == batch["targets"]


def test_the_best_of_a_pair_is_kept_by_its_examples_loss() -> None:
    target, batch, gone = adapt(build(LxmertForNLVR2)), nlvr2_batch(), []

    def losses(outputs: Any, batch: Batch) -> Tensor:
        gone.append(outputs.loss.detach())
        return outputs.loss

    result = Attack(ascents(), PGD(3, keep="best"), loss=losses)(target, batch)
    best = torch.stack(gone[:4]).amax(0)
    assert result.losses.shape == (3,)
    torch.testing.assert_close(result.losses, best, rtol=1e-12, atol=0)
    with torch.no_grad(), target.inject(result.deltas):
        torch.testing.assert_close(target.forward(batch).loss, best, rtol=1e-12, atol=0)


def test_both_rows_of_a_pair_stop_when_its_example_is_misjudged() -> None:
    batch, never = nlvr2_batch(), torch.tensor([True, False, True])
    attack = Attack(ascents(), PGD(2, early_stop=True), correct=lambda outputs, batch: never)
    result = attack(adapt(build(LxmertForNLVR2)), batch)
    assert result.correct.shape == (3,)
    for delta in result.deltas.values():
        assert delta.flatten(1).any(1).tolist() == [True, True, False, False, True, True]


def test_pooled_vectors_of_pairs_are_two_of_an_example() -> None:
    target = adapt(build(LxmertForNLVR2), {"pooled": Site("lxmert.pooler", examples=examples)})
    perturber = EmbeddingPerturber(pooled=Ascent(L2(0.5), step_size=0.3))
    result = Attack(perturber, PGD(3, keep="best"))(target, nlvr2_batch())
    torch.testing.assert_close(result.deltas["pooled"].norm(dim=1), torch.full((6,), 0.5).double())


def test_examples_that_fit_no_row_are_refused() -> None:
    target = adapt(build(LxmertForNLVR2), {"pooled": Site("lxmert.pooler", examples=lambda batch: torch.arange(3))})
    with pytest.raises(
        ShapeError, match=r"expected examples of 'pooled' as the example of each of the 6 rows .* got \(3,\)"
    ):
        Attack(EmbeddingPerturber(pooled=Ascent(L2(0.5), step_size=0.3)), PGD(1))(target, nlvr2_batch())


@PADDED
def test_masks_of_floats_are_masks(kind: type[nn.Module]) -> None:
    batch = KINDS[kind](more_text=1, more_regions=1)
    floats = batch | {name: batch[name].double() for name in ("attention_mask", "visual_attention_mask")}
    expected = deltas(VILLA, build(kind), batch)
    for ours, theirs in zip(deltas(VILLA, build(kind), floats), expected, strict=True):
        assert all(torch.equal(ours[modality], theirs[modality]) for modality in ("text", "image"))


def test_the_robustness_of_pairs_is_measured_example_by_example() -> None:
    target, batch = adapt(build(LxmertForNLVR2)), nlvr2_batch()
    curve = robustness_curve(
        target,
        [batch],
        modality="image",
        radii=(5.0,),
        attacks=WorstCase(steps=5, restarts=2),
        targets=lambda batch: F.one_hot(batch["targets"], 2).double(),
    )
    assert curve.clean.shape == (3,)
    assert curve.scores.sum() < curve.clean.sum()


@PADDED
def test_a_wrapped_model_is_adapted(kind: type[nn.Module]) -> None:
    batch = KINDS[kind]() | {"question_id": torch.arange(3)}
    bare = deltas(VILLA, build(kind), batch)
    for found, expected in zip(deltas(VILLA, Wrapper(build(kind), "module"), batch), bare, strict=True):
        assert all(torch.equal(found[modality], expected[modality]) for modality in ("text", "image"))


@pytest.mark.parametrize("count", [0, 2])
def test_one_lxmert_is_expected(count: int) -> None:
    with pytest.raises(SiteError, match=f"expected one LxmertModel in ModuleList, got {count}"):
        lxmert_adapter(nn.ModuleList(build(LxmertModel) for _ in range(count)))


@pytest.mark.parametrize("kind", [LxmertForQuestionAnswering, LxmertForPreTraining, LxmertForVQA, LxmertForNLVR2])
@pytest.mark.parametrize("by", ["batch", "configuration"])
def test_outputs_as_a_tuple_are_read_like_named_ones(kind: type[nn.Module], by: str) -> None:
    batch, model = KINDS[kind](), build(kind)
    method = AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3)), FreeLB(2), SymmetricKL())
    expected = method.step(adapt(model), batch)
    if by == "configuration":
        model.config.return_dict = False
    else:
        batch = batch | {"return_dict": False}
    found = method.step(adapt(model), batch)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.regularization, expected.regularization)
    assert found.regularization > 0
