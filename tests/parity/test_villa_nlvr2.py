"""NLVR2 with its three heads, number for number as VILLA's and UNITER's published code in float64."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import adversarial, parameter_gradients, sees_one_changed_number, shapes_of
from torch import Tensor

from advvl import adapt
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2

CASES = document("villa_nlvr2", "cases")


def ours(options: dict[str, Any]) -> dict[str, Tensor]:
    model = UniterForNLVR2(UniterConfig(**document("villa_nlvr2", "config")), variant=options["model"]).double()
    model.load_state_dict(tensors("villa_nlvr2", options["state"]))
    inputs = batch("villa_nlvr2", options["batch"])
    if options["modality"] != "none":
        return adversarial(options, adapt(model), inputs, shapes=shapes_of(model.config, inputs))
    output = model(**inputs)
    loss = output.loss.mean()
    loss.backward()
    found = {"logits": output.logits.detach(), "losses": output.losses.detach(), "loss": loss.detach()}
    return found | parameter_gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_villa_nlvr2(case: str) -> None:
    assert not disagreements(ours(CASES[case]), tensors("villa_nlvr2", f"villa_{case}"))


@pytest.mark.parametrize("case", CASES)
def test_one_changed_number_of_villa_nlvr2_is_seen(case: str) -> None:
    assert sees_one_changed_number(tensors("villa_nlvr2", f"villa_{case}"))
