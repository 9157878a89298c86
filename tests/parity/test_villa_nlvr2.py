"""NLVR2 with its three heads, number for number as VILLA's and UNITER's published code in float64."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import sees_one_changed_number, step_of_task
from torch import Tensor

from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2

CASES = document("villa_nlvr2", "cases")


def ours(options: dict[str, Any]) -> dict[str, Tensor]:
    model = UniterForNLVR2(UniterConfig(**document("villa_nlvr2", "config")), variant=options["model"]).double()
    model.load_state_dict(tensors("villa_nlvr2", options["state"]))
    return step_of_task(options, model, batch("villa_nlvr2", options["batch"]))


@pytest.mark.parametrize("case", CASES)
def test_parity_with_villa_nlvr2(case: str) -> None:
    assert not disagreements(ours(CASES[case]), tensors("villa_nlvr2", f"villa_{case}"))


@pytest.mark.parametrize("case", CASES)
def test_one_changed_number_of_villa_nlvr2_is_seen(case: str) -> None:
    assert sees_one_changed_number(tensors("villa_nlvr2", f"villa_{case}"))
