"""LXMERT's tasks: the published losses, the layout of NLVR2's pairs, what is refused, and transformers' own loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.lxmert_batches import ANSWERS, lxmert_batch, lxmert_config, nlvr2_batch, vqa_batch
from torch import Tensor
from torch.nn import functional as F
from transformers import LxmertConfig, LxmertForQuestionAnswering

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.tasks.lxmert.nlvr2 import LxmertForNLVR2, nlvr2_losses
from advvl.tasks.lxmert.vqa import LxmertForVQA

Kind = type[LxmertForVQA] | type[LxmertForNLVR2]
BATCHES = {LxmertForVQA: vqa_batch, LxmertForNLVR2: nlvr2_batch}
BOTH = pytest.mark.parametrize("kind", BATCHES, ids=lambda kind: kind.__name__)


def build(kind: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(lxmert_config(**options)).double().eval()


def test_the_mean_of_the_vqa_losses_is_the_published_loss() -> None:
    model, batch = build(LxmertForVQA), vqa_batch()
    output = model(**batch)
    assert output.logits.shape == (3, ANSWERS)
    published = F.binary_cross_entropy_with_logits(output.logits, batch["targets"]) * ANSWERS
    torch.testing.assert_close(output.loss.mean(), published, rtol=1e-14, atol=0)
    assert output.loss.shape == (3,)


def test_vqa_scores_are_those_of_transformers() -> None:
    model, theirs = build(LxmertForVQA), build(LxmertForQuestionAnswering, seed=1)
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model(**lxmert_batch()).logits, theirs(**lxmert_batch()).question_answering_score)


def test_a_pair_is_judged_by_both_pooled_vectors_first_image_first() -> None:
    model, batch = build(LxmertForNLVR2), nlvr2_batch()
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    pooled = [
        model.lxmert(
            **text,
            visual_feats=batch["visual_feats"][:, image],
            visual_pos=batch["visual_pos"][:, image],
            visual_attention_mask=batch["visual_attention_mask"][:, image],
        ).pooled_output
        for image in (0, 1)
    ]
    expected = model.answer_head.logit_fc(torch.cat(pooled, 1))
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, batch["targets"], reduction="none"))


def test_the_head_of_pairs_has_the_published_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in build(LxmertForNLVR2).answer_head.state_dict().items()}
    assert shapes == {
        "logit_fc.0.weight": (32, 32),
        "logit_fc.0.bias": (32,),
        "logit_fc.2.weight": (32,),
        "logit_fc.2.bias": (32,),
        "logit_fc.3.weight": (2, 32),
        "logit_fc.3.bias": (2,),
    }


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        vqa = LxmertForVQA(LxmertConfig(num_qa_labels=3129))
        nlvr2 = LxmertForNLVR2(LxmertConfig())
    assert tuple(vqa.answer_head.logit_fc[0].weight.shape) == (1536, 768)
    assert tuple(vqa.answer_head.logit_fc[3].weight.shape) == (3129, 1536)
    assert tuple(nlvr2.answer_head.logit_fc[0].weight.shape) == (1536, 1536)


@BOTH
def test_without_targets_there_is_no_loss_and_without_masks_all_is_real(kind: Kind) -> None:
    model, batch = build(kind), BATCHES[kind]()
    targets = batch.pop("targets")
    output = model(**batch)
    assert output.loss is None
    assert torch.equal(output.logits, model(**batch, targets=targets).logits)
    ones = {name: torch.ones_like(batch.pop(name)) for name in ("attention_mask", "visual_attention_mask")}
    del batch["token_type_ids"]
    torch.testing.assert_close(model(**batch).logits, model(**batch, **ones).logits, rtol=1e-12, atol=1e-12)


@BOTH
def test_every_parameter_that_is_trained_gets_a_gradient(kind: Kind) -> None:
    """One without would keep DistributedDataParallel waiting."""
    model = build(kind)
    model(**BATCHES[kind]()).loss.mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[4] for name in without} == {"visn_self_att", "visn_inter", "visn_output"}
    assert all(name.startswith("lxmert.encoder.x_layers.1.") for name in without)


@BOTH
def test_transformers_saves_and_loads_it(tmp_path: Path, kind: Kind) -> None:
    model = build(kind).float()
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_transformers_own_model_is_loaded_as_a_task(tmp_path: Path) -> None:
    theirs = build(LxmertForQuestionAnswering).float()
    theirs.save_pretrained(tmp_path)
    model = LxmertForVQA.from_pretrained(tmp_path).double()
    theirs = theirs.double()
    assert torch.equal(model(**lxmert_batch()).logits, theirs(**lxmert_batch()).question_answering_score)


def test_low_precision_logits_are_compared_in_float32() -> None:
    logits, targets = torch.randn(4, 2).bfloat16(), torch.tensor([0, 1, 1, 0])
    assert torch.equal(nlvr2_losses(logits, targets), nlvr2_losses(logits.float(), targets))


def without(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {field: value for field, value in batch.items() if field != name}


@BOTH
@pytest.mark.parametrize("field", ["input_ids", "visual_feats", "visual_pos"])
def test_a_missing_field_is_named(kind: Kind, field: str) -> None:
    with pytest.raises(DataError, match=f"got no {field};"):
        build(kind)(**without(BATCHES[kind](), field))


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (
            LxmertForVQA,
            {"visual_feats": torch.ones(3, 5, 8)},
            ShapeError,
            r"visual_feats of shape \(B, R, 7\) = \(3, 5, 7",
        ),
        (LxmertForVQA, {"visual_feats": torch.ones(3, 2, 5, 7)}, ShapeError, r"\(B, R, 7\)"),
        (LxmertForVQA, {"visual_pos": torch.ones(3, 4, 4)}, ShapeError, r"visual_pos of shape .* = \(3, 5, 4\)"),
        (
            LxmertForVQA,
            {"visual_pos": torch.ones(3, 5, 4).long()},
            DataError,
            r"visual_pos of floating-point .*; convert",
        ),
        (LxmertForVQA, {"targets": torch.ones(3, 6)}, ShapeError, r"targets of shape \(B, A\) = \(3, 5\)"),
        (LxmertForNLVR2, {"visual_feats": torch.ones(3, 5, 7)}, ShapeError, r"\(B, 2, R, 7\)"),
        (
            LxmertForNLVR2,
            {"visual_feats": torch.ones(3, 3, 5, 7)},
            ShapeError,
            r"\(3, 2, 5, 7\), got .*; .* pair of images",
        ),
        (
            LxmertForNLVR2,
            {"targets": torch.ones(6).long()},
            ShapeError,
            r"targets of shape \(B,\) = \(3,\), .*; give one",
        ),
        (LxmertForNLVR2, {"targets": torch.ones(3)}, DataError, "whole numbers, 1 for a true .*; give classes"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: Kind, changes: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(kind)(**BATCHES[kind]() | changes)


def test_an_answer_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="num_qa_labels of 1 or more, got 0; give the number"):
        build(LxmertForVQA, num_qa_labels=0)
