"""Referring expressions, number for number as UNITER's published code in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import parameter_gradients, sees_one_changed_number
from torch import Tensor

from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.metrics import overlaps, region_accuracy
from advvl.tasks.uniter.referring import UniterForReferringExpressions, draw_regions

CASES = document("uniter_re", "cases")


def model_of(options: dict[str, Any]) -> UniterForReferringExpressions:
    losses = {name: options[name] for name in ("mlp", "loss", "margin", "hard_ratio") if name in options}
    model = UniterForReferringExpressions(UniterConfig(**document("uniter_re", "config")), **losses).double()
    model.load_state_dict(tensors("uniter_re", options["state"]))
    return model


def ours(options: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    model, inputs = model_of(options), batch("uniter_re", options["batch"])
    found = {}
    if options["loss"] == "rank":
        scores = model(**inputs, negatives=expected["negatives"]).logits
        real, targets = inputs["obj_masks"] == 0, inputs["targets"].flatten()
        best = draw_regions(scores, targets, real, hard_ratio=1.0)
        assert torch.equal(best[expected["hard"].bool()], expected["negatives"][expected["hard"].bool()])
        assert (expected["negatives"] != targets).all()
        found = {name: expected[name] for name in ("hard", "negatives")}
        inputs["negatives"] = expected["negatives"]
    output = model(**inputs)
    total = output.loss.sum()  # the published total; a mean is the default of a step
    total.backward()
    scores = output.logits.detach()
    found |= {"scores": scores, "region_scores": scores[inputs["obj_masks"] == 0]}
    found |= {"loss": output.losses.detach(), "total": total.detach()}
    return found | parameter_gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_uniter_re(case: str) -> None:
    expected = tensors("uniter_re", f"re_{case}")
    assert not disagreements(ours(CASES[case], expected), expected)


@pytest.mark.parametrize("case", CASES)
def test_one_changed_number_of_uniter_re_is_seen(case: str) -> None:
    expected = tensors("uniter_re", f"re_{case}")
    assert sees_one_changed_number({name: value for name, value in expected.items() if value.is_floating_point()})


@pytest.mark.parametrize("case", CASES)
def test_masks_of_uniter_re_may_be_left_to_the_lengths(case: str) -> None:
    model, inputs = model_of(CASES[case] | {"loss": "cls"}), batch("uniter_re", "batch")
    expected = model(**inputs)
    inputs.pop("obj_masks")
    found = model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("head", sorted({"mlp1", "mlp2"} | document("uniter_re", "eval").keys() - {"overlaps"}))
def test_parity_with_uniter_re_in_evaluation(head: str) -> None:
    """The region of the highest score, as a box in pixels of a picture of 640x480."""
    golden, inputs = document("uniter_re", "eval")[head], batch("uniter_re", "batch")
    case = next(options for options in CASES.values() if options["state"] == f"uniter_re_{head}")
    picked = model_of(case).eval()(**inputs).logits.argmax(1)
    pixels = torch.tensor([640.0, 480.0, 640.0, 480.0], dtype=torch.float64)

    def boxes(regions: Tensor) -> Tensor:
        return inputs["img_pos_feat"][torch.arange(len(regions)), regions][:, [0, 1, 4, 5]] * pixels

    found, meant = boxes(picked), boxes(inputs["targets"].flatten())
    predictions = list(golden["predictions"].values())
    for ours, name in ((found, "pred_box"), (meant, "tgt_box")):
        theirs = torch.tensor([row[name] for row in predictions], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for published in (False, True):
        assert region_accuracy(found, meant, published=published) == golden["log"]["valid/acc"]


def test_parity_with_uniter_re_in_overlaps() -> None:
    rows = document("uniter_re", "eval")["overlaps"]
    one, other = (torch.tensor([row[n] for row in rows], dtype=torch.float64) for n in (0, 1))
    expected = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(overlaps(one, other, published=True), expected, rtol=1e-12, atol=1e-12)
    plain = overlaps(one, other)
    differ = (plain - expected).abs() > 1e-12
    assert differ.any()  # of intersections up to a pixel wide or high alone
    ends = torch.minimum(one[:, :2] + one[:, 2:], other[:, :2] + other[:, 2:])
    sides = ends - torch.maximum(one[:, :2], other[:, :2])
    assert ((sides > 0) & (sides <= 1)).any(1)[differ].all()
