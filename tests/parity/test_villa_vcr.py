"""Visual commonsense reasoning, number for number as VILLA's published loop in float64, evaluation among it."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import adversarial, parameter_gradients, sees_one_changed_number
from torch import Tensor

from advvl import adapt
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.vcr import VCR_WORDS, UniterForVCR

CASES = document("villa_vcr", "cases")
HALF = 0.5  # of J: the published penalty is a mean over rows and both classes


def model_of(state: str) -> UniterForVCR:
    config = document("villa_vcr", "config")  # sizes of the extended model; ours extends those of pre-training
    assert config.pop("special_tokens") == VCR_WORDS
    model = UniterForVCR(UniterConfig(**config | {"vocab_size": config["vocab_size"] - VCR_WORDS})).double()
    model.load_state_dict(tensors("villa_vcr", state))
    return model


def ours(options: dict[str, Any]) -> dict[str, Tensor]:
    model, inputs = model_of(options["state"]), batch("villa_vcr", options["batch"])
    if options["modality"] != "none":
        return adversarial(options, adapt(model), inputs, kl_share=HALF)
    output = model(**inputs)
    loss = output.loss.mean()
    loss.backward()
    found = {"logits": output.logits.detach(), "losses": loss.detach(), "loss": loss.detach()}
    return found | parameter_gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_villa_vcr(case: str) -> None:
    assert not disagreements(ours(CASES[case]), tensors("villa_vcr", f"villa_{case}"))


@pytest.mark.parametrize("case", CASES)
def test_one_changed_number_of_villa_vcr_is_seen(case: str) -> None:
    assert sees_one_changed_number(tensors("villa_vcr", f"villa_{case}"))


def test_parity_with_villa_vcr_in_evaluation() -> None:
    model = model_of("uniter_vcr").eval()
    found = {}
    for split in ("val", "test"):
        inputs = batch("villa_vcr", f"batch_eval_{split}")
        fields = {name: value for name, value in inputs.items() if name not in ("qa_targets", "qar_targets")}
        found[f"{split}.logits"] = model(**fields).logits.detach()
    assert not disagreements(found, tensors("villa_vcr", "eval"))
