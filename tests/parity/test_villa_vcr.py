"""Visual commonsense reasoning, number for number as VILLA's published loop in float64, evaluation among it."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import sees_one_changed_number, step_of_task
from torch import Tensor

from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.metrics import vcr_accuracy
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
    found = step_of_task(options, model, inputs, kl_share=HALF)
    return found | ({"losses": found["loss"]} if "losses" in found else {})  # of which the file has the mean


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


LOGGED = {"qa": "acc_qa", "qar": "acc_qar", "both": "acc", "qa_loss": "vcr_qa_loss", "qar_loss": "vcr_qar_loss"}


@pytest.mark.parametrize(
    ("split", "published", "golden"),
    [("val", False, "log"), ("val", True, "log"), ("test", True, "log"), ("test", False, "one_question_a_batch")],
)
def test_parity_with_villa_vcr_in_what_validate_logs(split: str, published: bool, golden: str) -> None:
    """Of 20 columns the published log is that of all questions' rationales at once; ours is of each one's own."""
    expected, inputs = document("villa_vcr", "eval")[split], batch("villa_vcr", f"batch_eval_{split}")
    columns = 8 if split == "val" else 20
    scores = tensors("villa_vcr", "eval")[f"{split}.logits"][:, 1].reshape(-1, columns)
    for row, written in zip(scores.tolist(), expected["scores"].values(), strict=True):
        assert row == pytest.approx(written, rel=1e-12)
    found = vcr_accuracy(scores, inputs["qa_targets"], inputs["qar_targets"], published=published)
    log = {name: getattr(found, field) for field, name in LOGGED.items()}
    assert {f"valid/{name}": value for name, value in log.items()} == pytest.approx(expected[golden], rel=1e-12)
