"""Every pre-training task is the published one, number for number, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_cases
import pytest
import torch
from golden_cases import batch, disagreements, document, tensors
from torch import Tensor

from advvl.models.uniter import UniterConfig
from advvl.tasks.pretraining import UniterForPretraining

TASKS = {"mlm": "mlm", "itm": "itm", "mrfr": "mrfr", "mrc": "mrc", "mrckl": "mrc-kl"}  # golden name to ours
ONLY = {  # the fields of one task or another
    "mlm": {"txt_labels"},
    "itm": {"targets"},
    "mrfr": {"img_masks", "img_mask_tgt", "feat_targets"},
    "mrc": {"img_masks", "img_mask_tgt", "label_targets"},
    "mrckl": {"img_masks", "img_mask_tgt", "label_targets"},
}


def inputs(case: str) -> dict[str, Tensor]:
    fields, others = batch("uniter_pretrain"), set().union(*ONLY.values()) - ONLY[case]
    if "img_masks" in ONLY[case]:
        fields["img_feat"] = fields["img_feat"].masked_fill(fields["img_masks"][..., None], 0.0)
    return {name: value for name, value in fields.items() if name not in others}


def golden(case: str) -> dict[str, Tensor]:
    """The golden tensors of a task, less its name."""
    every = tensors("uniter_pretrain", "losses")
    return {name.partition(".")[2]: value for name, value in every.items() if name.partition(".")[0] == case}


def ours(case: str, **options: Any) -> dict[str, Tensor]:
    """What the golden file holds of a task, from ours; gradients of the parameters that it names."""
    model = UniterForPretraining(UniterConfig(**document("uniter_pretrain", "config") | options)).double()
    model.load_state_dict(tensors("uniter_pretrain", "uniter_pretrain"))
    fields = inputs(case)
    output = model(task=TASKS[case], **fields)
    output.loss.backward()
    found = {"loss": output.losses.detach(), "total": output.loss.detach()}
    if output.distances is not None:
        found["ot_pos"] = output.distances.detach()[fields["targets"] == 1]
        found["ot_neg"] = output.distances.detach()[fields["targets"] == 0]
    for name in golden(case):
        if name.startswith("grad."):
            gradient = model.get_parameter(name.removeprefix("grad.")).grad
            assert gradient is not None, name
            found[name] = gradient
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", TASKS)
def test_a_task_is_the_published_one(case: str, attention: str) -> None:
    assert not disagreements(ours(case, attn_implementation=attention), golden(case))


def test_no_golden_tensor_is_left_out() -> None:
    assert {name.partition(".")[0] for name in tensors("uniter_pretrain", "losses")} == TASKS.keys()
    assert all(len(golden(case)) >= 5 for case in TASKS)


@pytest.mark.parametrize("case", TASKS)
def test_a_difference_in_any_tensor_is_seen(case: str) -> None:
    found, expected = ours(case), golden(case)
    for name, value in found.items():
        off = found | {name: value + 1e-8 * value.abs().max()}
        assert len(disagreements(off, expected)) == 1
        rest = {other: tensor for other, tensor in found.items() if other != name}
        assert disagreements(rest, expected) == [f"missing {name}"]


@pytest.mark.parametrize("exists", [False, True], ids=["no-folder", "empty-folder"])
def test_without_golden_tensors_nothing_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    if exists:
        (tmp_path / "uniter_pretrain").mkdir()
    monkeypatch.setattr(golden_cases, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="uniter_pretrain"):
        ours("mlm")


def test_masked_features_and_their_embedding_count() -> None:
    model = UniterForPretraining(UniterConfig(**document("uniter_pretrain", "config"))).double()
    model.load_state_dict(tensors("uniter_pretrain", "uniter_pretrain"))
    fields = inputs("mrfr")
    unmasked = {name: value for name, value in fields.items() if name != "img_masks"}
    losses = [model(task="mrfr", **batch_).losses for batch_ in (fields, unmasked)]
    assert (losses[0] - losses[1]).abs().max() > 1e-3
    torch.testing.assert_close(losses[0], golden("mrfr")["loss"], rtol=1e-11, atol=1e-11)
