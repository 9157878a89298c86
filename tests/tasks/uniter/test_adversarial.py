"""VILLA on every task of UNITER: both modalities move, and what is kept steady is what the task predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.task_batches import MODELS, batch_of, model_of
from support.uniter_batches import without_lengths
from torch import Tensor

from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    PassTrace,
    SymmetricKL,
    Uniform,
    adapt,
    villa,
)
from advvl.evaluation.robustness import WorstCase, robustness_curve
from advvl.models.uniter.model import region_mask, text_mask
from advvl.tasks.uniter.retrieval import UniterForRetrieval, hardest

STEPS = {"text": 0.3, "image": 0.3}


def passes_of(method: AdversarialTraining, task: str, batch: dict[str, Any]) -> list[PassTrace]:
    """The passes of a step, without dropout, whose draws depend on the padding."""
    passes: list[PassTrace] = []
    model = model_of(task, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    method.step(adapt(model), batch, trace=passes.append)
    return passes


@pytest.mark.parametrize("order", ["together", "in turn"])
@pytest.mark.parametrize("task", MODELS)
def test_a_step_of_villa_moves_both_modalities_and_teaches_every_parameter_that_learns(task: str, order: Any) -> None:
    model, batch = model_of(task), batch_of(task)
    report = villa(step_sizes=STEPS, modalities=order).step(adapt(model), batch)
    assert report.loss.isfinite()
    for modality, norms in report.delta_norms.items():
        assert norms.shape == (len(batch["input_ids"]),), modality
        assert (norms > 0.1).all(), modality
    assert report.delta_norms.keys() == {"text", "image"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    pooler = {"uniter.pooler.dense.weight", "uniter.pooler.dense.bias"}
    assert frozen == {"uniter.img_embeddings.mask_embedding.weight"} | {
        "nlvr2-paired-attn": pooler,
        "re-cls": pooler,
        "re-rank": pooler,
        "retrieval": {"itm_output.weight", "itm_output.bias"},
    }.get(task, set())


@pytest.mark.parametrize("task", MODELS)
def test_padding_is_never_perturbed_and_changes_nothing(task: str) -> None:
    """Scores of padded regions alone come and go with the padding."""
    ascents = {m: Ascent(L2(0.5), step_size=0.3) for m in ("text", "image")}
    method = AdversarialTraining(EmbeddingPerturber(**ascents), FreeLB(3), SymmetricKL(1.5))
    batch, wider = batch_of(task), batch_of(task, more_text=3, more_regions=2, more_places=4)
    if task == "re-rank":
        batch, wider = (fields | {"negatives": torch.tensor([0, 1, 0, 0])} for fields in (batch, wider))
    found, expected = passes_of(method, task, wider), passes_of(method, task, batch)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.logits is not None
        assert other.logits is not None
        real = one.logits[:, : other.logits.shape[1]]
        torch.testing.assert_close(real, other.logits, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(one.task_loss, other.task_loss, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(one.regularization, other.regularization, rtol=1e-7, atol=1e-10)
    for modality, mask in (("text", text_mask(wider)), ("image", region_mask(wider))):
        assert not found[-1].deltas[modality][~mask].any()
        assert found[-1].deltas[modality][mask].any()


@pytest.mark.parametrize("task", MODELS)
def test_lengths_may_be_left_out(task: str) -> None:
    model, batch = model_of(task).eval(), batch_of(task)
    torch.manual_seed(0)
    expected = model(**batch)
    torch.manual_seed(0)
    found = model(**without_lengths(batch))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def j(clean: Tensor, perturbed: Tensor) -> Tensor:
    """J by hand: both directions, summed over the last axis, a mean over the rest."""
    p, q = perturbed.softmax(-1), clean.softmax(-1)
    return ((p - q) * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("task", [task for task in MODELS if not task.startswith("re-")])
def test_the_penalty_is_over_the_choices_of_an_example(task: str) -> None:
    """Answers of a question, false and true of a sentence, right and wrong of a choice, the pairs of a group."""
    batch = batch_of(task)
    clean, *rest = passes_of(villa(step_sizes=STEPS), task, batch)
    shape = {"vqa": (4, 5), "ve": (4, 3), "vcr": (4, 2), "retrieval": (2, 3)}.get(task, (3, 2))
    for seen in rest:
        assert seen.logits is not None
        assert clean.logits is not None
        assert seen.logits.shape == shape
        torch.testing.assert_close(seen.regularization, 1.5 * j(clean.logits, seen.logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", ["re-cls", "re-rank"])
def test_the_penalty_of_referring_expressions_is_over_the_real_regions_alone(task: str) -> None:
    batch = batch_of(task, more_regions=3)
    clean, *rest = passes_of(villa(step_sizes=STEPS), task, batch)
    for seen in rest:
        assert seen.logits is not None
        assert clean.logits is not None
        rows = [j(a[:n], b[:n]) for a, b, n in zip(clean.logits, seen.logits, batch["num_bbs"], strict=True)]
        torch.testing.assert_close(seen.regularization, 1.5 * torch.stack(rows).mean(), rtol=1e-9, atol=1e-12)


def test_each_pair_of_a_group_may_be_kept_steady_by_itself() -> None:
    ascents = {m: Ascent(L2(), step_size=0.3) for m in ("text", "image")}
    method = AdversarialTraining(EmbeddingPerturber(**ascents), FreeLB(2), SymmetricKL(head="sigmoid"))
    clean, _, moved = passes_of(method, "retrieval", batch_of("retrieval"))
    assert clean.logits is not None
    assert moved.logits is not None
    p, q = moved.logits.sigmoid(), clean.logits.sigmoid()
    by_hand = (p - q) * (moved.logits - clean.logits)  # of match and mismatch, whose log-odds are the score
    torch.testing.assert_close(moved.regularization, by_hand.sum(1).mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("task", "owners"),
    [
        ("nlvr2-paired-attn", [0, 0, 1, 1, 2, 2]),
        ("nlvr2-paired", [0, 0, 1, 1, 2, 2]),
        ("retrieval", [0, 0, 0, 1, 1, 1]),
        ("nlvr2-triplet", None),
        ("vcr", None),
        ("re-cls", None),
    ],
)
def test_an_attack_knows_whose_each_row_is(task: str, owners: list[int] | None) -> None:
    model, batch = model_of(task).eval(), batch_of(task)
    ascents = {m: Ascent(L2(0.5), step_size=0.3, start=Uniform(0.1)) for m in ("text", "image")}
    result = Attack(EmbeddingPerturber(**ascents), PGD(2))(model, batch)
    assert result.losses is not None
    assert len(result.losses) == len(model(**batch).loss)
    assert (result.losses >= model(**batch).loss).all()
    for modality in ("text", "image"):
        found = result.owners.get(modality)
        assert (found is None) == (owners is None)
        assert found is None or found.tolist() == owners


def classes(batch: dict[str, Any]) -> Tensor:
    """The right class of each example; in retrieval the match, which comes first in its group."""
    if "sample_size" in batch:
        return torch.zeros(len(batch["input_ids"]) // batch["sample_size"], dtype=torch.long)
    targets: Tensor = batch["targets"]
    return targets if targets.is_floating_point() else targets.flatten()


@pytest.mark.parametrize("task", MODELS)
def test_a_robustness_curve_scores_each_example_and_falls(task: str) -> None:
    model, batch = model_of(task), batch_of(task)
    examples = len(model.eval()(**batch).logits)
    attacks = WorstCase(steps=3, step_fraction=0.5)
    curve = robustness_curve(
        adapt(model), [batch], modality="image", radii=(0.5, 50.0), attacks=attacks, targets=classes
    )
    assert curve.clean.shape == (examples,)
    assert curve.scores.shape == (2, examples)
    assert not curve.unmoved.any()
    assert (curve.scores <= curve.clean).all()
    assert (curve.scores[1] <= curve.scores[0]).all()
    assert curve.scores[1].sum() < curve.clean.sum() or not curve.clean.any()


@pytest.mark.parametrize("task", MODELS)
def test_half_precision_trains_with_a_loss_in_single(task: str) -> None:
    model = model_of(task).bfloat16()
    batch = {
        n: t.float() if isinstance(t, Tensor) and t.dtype == torch.float64 else t for n, t in batch_of(task).items()
    }
    report = villa(step_sizes={"text": 3.0, "image": 3.0}).step(adapt(model), batch)
    assert report.loss.dtype == torch.float32
    assert report.loss.isfinite()
    assert model(**batch).loss.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_both_copies_of_a_sentence_have_a_perturbation_of_their_own() -> None:
    *_, last = passes_of(villa(step_sizes=STEPS), "nlvr2-paired-attn", batch_of("nlvr2-paired-attn"))
    text = last.deltas["text"]
    assert ((text[0::2] - text[1::2]).flatten(1).norm(dim=1) > 1e-3).all()
    assert text.flatten(1).norm(dim=1).amin() > 0.1


def test_hard_negatives_are_trained_on_as_any_group() -> None:
    model = model_of("retrieval")
    assert isinstance(model, UniterForRetrieval)
    batch = batch_of("retrieval")
    batch["input_ids"], batch["txt_lens"] = batch["input_ids"][:1], batch["txt_lens"][:1].expand(6)
    group = hardest(model, batch, 2)
    report = villa(step_sizes=STEPS).step(adapt(model), group)
    assert report.rows == {"text": 3, "image": 3}
    assert report.loss.isfinite()
    assert model.training
