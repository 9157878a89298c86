"""A step is the published loop, number for number, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_cases import batch, disagreements, document, kind, tensors
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from advvl import (
    L2,
    AdversarialTraining,
    Ascent,
    Ball,
    EmbeddingPerturber,
    FreeLB,
    Given,
    Linf,
    PassTrace,
    Site,
    SymmetricKL,
    adapt,
)
from advvl.models.uniter import UniterConfig
from advvl.tasks.vqa import UniterForVQA

FREELB = sorted(document("freelb_bert", "cases"))
VILLA = sorted(document("villa_vqa", "cases"))


def ball(case: dict[str, Any]) -> Ball:
    radius = case["max_norm"] or math.inf
    return L2(radius) if case["norm"] == "l2" else Linf(radius)


def parameter_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def freelb(case: str) -> dict[str, Tensor]:
    """Every tensor that the golden file of a case holds, from one step of ours."""
    options, start = document("freelb_bert", "cases")[case], tensors("freelb_bert", f"freelb_{case}")["delta_init"]
    model = BertForSequenceClassification(BertConfig(**document("freelb_bert", "config"))).double()
    model.load_state_dict(tensors("freelb_bert", "bert_cls"))
    target = adapt(model, {"text": Site("bert.embeddings.word_embeddings", mask=lambda batch: batch["attention_mask"])})
    ascent = Ascent(ball(options), step_size=options["lr"], start=Given(start), floor=1e-8)
    passes: list[PassTrace] = []
    method = AdversarialTraining(EmbeddingPerturber(text=ascent), FreeLB(options["steps"]))
    method.step(target, batch("freelb_bert"), trace=passes.append)
    found = {"delta_init": passes[0].deltas["text"]} | parameter_gradients(model)
    for step, (this, following) in enumerate(zip(passes, [*passes[1:], None], strict=True)):
        found[f"step{step}.logits"] = this.logits
        found[f"step{step}.loss"] = this.weight * this.task_loss
        if following is not None:
            found[f"step{step}.grad"] = this.weight * this.gradients["text"]
            found[f"step{step}.delta"] = following.deltas["text"]
    return found


@pytest.mark.parametrize("case", FREELB)
def test_freelb_is_the_published_loop(case: str) -> None:
    assert not disagreements(freelb(case), tensors("freelb_bert", f"freelb_{case}"))


def villa(case: str) -> dict[str, Tensor]:
    """Every tensor that the golden file of a case holds, from one step of ours."""
    options, config = document("villa_vqa", "cases")[case], document("villa_vqa", "config")
    answers = config.pop("num_answers")
    model = UniterForVQA(UniterConfig(**config), num_answers=answers).double()
    model.load_state_dict(tensors("villa_vqa", "uniter_vqa"))
    in_turn = options["modality"] == "alter"
    modalities = ("text", "image") if options["modality"] in ("both", "alter") else (options["modality"],)
    perturber = EmbeddingPerturber(
        **{m: Ascent(ball(options), step_size=options[f"lr_{m}"], floor=1e-8) for m in modalities}
    )
    method = AdversarialTraining(
        perturber,
        FreeLB(options["steps"], "in turn" if in_turn else "together"),
        SymmetricKL(options["kl_weight"]),
    )
    passes: list[PassTrace] = []
    method.step(adapt(model), batch("villa_vqa"), trace=passes.append)

    found: dict[str, Any] = {"clean_logits": passes[0].logits} | parameter_gradients(model)
    turns = len(modalities) if in_turn else 1
    for step in range(options["steps"]):
        group = passes[1 + step * turns : 1 + (step + 1) * turns]
        following = passes[1 + (step + 1) * turns :]
        for seen in group:
            found[f"step{step}.logits" + (f"_{seen.modalities[0]}" if in_turn else "")] = seen.logits
            found |= {f"step{step}.{m}_grad": seen.weight * g for m, g in seen.gradients.items()}
        for seen in following[:turns]:
            found |= {f"step{step}.{m}_delta": d for m, d in seen.deltas.items()}
        found[f"step{step}.task_loss"] = sum(seen.task_loss for seen in group)
        found[f"step{step}.kl_loss"] = sum(seen.regularization for seen in group) / options["kl_weight"]
        found[f"step{step}.loss"] = sum(seen.weight * (seen.task_loss + seen.regularization) for seen in group)
    return found


@pytest.mark.parametrize("case", VILLA)
def test_villa_is_the_published_loop(case: str) -> None:
    golden = tensors("villa_vqa", f"villa_{case}")
    assert not disagreements(villa(case), golden)


@pytest.mark.parametrize("case", VILLA)
def test_one_changed_number_is_seen(case: str) -> None:
    """In the tensor of each kind that has the largest entry, in no more than its last eight digits."""
    golden = tensors("villa_vqa", f"villa_{case}")
    largest = {kind(name): name for name in sorted(golden, key=lambda name: golden[name].abs().max())}
    assert {"clean_logits", "grad", "loss"} <= largest.keys()
    for name in largest.values():
        changed = golden | {name: golden[name].clone()}
        changed[name].view(-1)[changed[name].abs().argmax()] *= 1 + 1e-8
        problems = disagreements(changed, golden)
        assert [problem.partition(":")[0] for problem in problems] == [name]
