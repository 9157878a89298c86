"""A step is the published loop, number for number, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_cases import batch, disagreements, document, tensors
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
    adapt,
)

FREELB = sorted(document("freelb_bert", "cases"))


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
