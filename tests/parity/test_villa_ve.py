"""Visual entailment, number for number as VILLA's published loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import sees_one_changed_number, step_of_task
from torch import Tensor

from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.ve import VE_LABELS, UniterForVE

CASES = document("villa_ve", "cases")


def ours(options: dict[str, Any]) -> dict[str, Tensor]:
    config = document("villa_ve", "config")
    assert config.pop("num_answers") == options["classes"] == len(VE_LABELS)
    model = UniterForVE(UniterConfig(**config)).double()
    model.load_state_dict(tensors("villa_ve", options["state"]))
    return step_of_task(options, model, batch("villa_ve", options["batch"]))


@pytest.mark.parametrize("case", CASES)
def test_parity_with_villa_ve(case: str) -> None:
    assert not disagreements(ours(CASES[case]), tensors("villa_ve", f"villa_{case}"))


@pytest.mark.parametrize("case", CASES)
def test_one_changed_number_of_villa_ve_is_seen(case: str) -> None:
    assert sees_one_changed_number(tensors("villa_ve", f"villa_{case}"))
