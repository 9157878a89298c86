"""Image-text retrieval, number for number as UNITER's published code in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden_cases import batch, disagreements, document, tensors
from support.golden_steps import parameter_gradients
from torch import Tensor

from advvl.models.uniter.layout import gather_index
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.metrics import recall
from advvl.tasks.uniter.retrieval import UniterForRetrieval, hardest

CASES = document("uniter_itm", "cases")


def model_of(options: dict[str, Any]) -> UniterForRetrieval:
    config = UniterConfig(**document("uniter_itm", "config"))
    model = UniterForRetrieval(config, margin=options["margin"]).double()
    model.load_state_dict(tensors("uniter_itm", options["state"]))
    return model


def ranked(options: dict[str, Any]) -> dict[str, Tensor]:
    model, inputs = model_of(options), batch("uniter_itm", options["batch"])
    assert inputs["sample_size"] == options["sample_size"]
    output = model(**inputs)
    total = output.loss.mean()
    total.backward()
    found = {"scores": output.logits.detach().reshape(-1, 1), "loss": output.losses.detach(), "total": total.detach()}
    return found | parameter_gradients(model)


def candidates(model: UniterForRetrieval, inputs: dict[str, Tensor]) -> Tensor:
    """The scores by which mismatches are chosen."""
    rows = len(inputs["num_bbs"])
    whole = {name: value.expand(rows, *value.shape[1:]) for name, value in inputs.items()}
    with torch.no_grad():
        scores: Tensor = model.eval()(**whole).logits
    model.train()
    return scores


def chosen(scores: Tensor, count: int) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 + scores[1:, 0].topk(count).indices])


def in_order(group: dict[str, Any], of: Tensor, wanted: Tensor) -> dict[str, Any]:
    """The rows of a group of these candidates in another order: none is promised."""
    order = [of.tolist().index(row) for row in wanted.tolist()]
    return {name: value if name == "sample_size" else value[order] for name, value in group.items()}


def hard(options: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    model, inputs = model_of(options), batch("uniter_itm", options["batch"])
    found = {"candidate_scores": candidates(model, inputs)}
    picked = chosen(found["candidate_scores"], options["hard_neg_size"])
    assert set(picked.tolist()) == set(expected["chosen"].tolist())
    group = in_order(hardest(model, inputs, options["hard_neg_size"]), picked, expected["chosen"])
    output = model(**group)
    total = output.loss.mean()
    total.backward()
    found |= {"chosen": expected["chosen"], "scores": output.logits.detach().reshape(-1, 1)}
    found |= {"loss": output.losses.detach(), "total": total.detach()}
    found |= {f"hard.{name}": group[name] for name in ("attn_masks", "gather_index")}
    found["hard.img_width"] = torch.tensor(group["img_feat"].shape[1])
    return found | parameter_gradients(model)


def update(options: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    model, found = model_of(options), {}
    for file, side in zip(options["batches"], options["sample_from"], strict=True):
        name, inputs = file.removeprefix("batch_hard_"), batch("uniter_itm", file)
        assert name[0] == side
        found[f"{name}.candidate_scores"] = candidates(model, inputs)
        picked, wanted = chosen(found[f"{name}.candidate_scores"], options["hard_neg_size"]), expected[f"{name}.chosen"]
        assert set(picked.tolist()) == set(wanted.tolist())
        output = model(**in_order(hardest(model, inputs, options["hard_neg_size"]), picked, wanted))
        loss = output.loss.mean() / options["train_batch_size"]
        loss.backward()
        found |= {f"{name}.chosen": wanted, f"{name}.scores": output.logits.detach().reshape(-1, 1)}
        if side == "t":
            found[f"{name}.logged_loss"] = loss.detach()
    return found | parameter_gradients(model)


def ours(case: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    options = CASES[case]
    if options["kind"] == "rank":
        return ranked(options)
    return (hard if options["kind"] == "hard" else update)(options, expected)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_uniter_itm(case: str) -> None:
    expected = tensors("uniter_itm", f"itm_{case}")
    assert not disagreements(ours(case, expected), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_difference_in_any_tensor_of_uniter_itm_is_seen(case: str) -> None:
    expected = tensors("uniter_itm", f"itm_{case}")
    found = ours(case, expected)
    for name, value in found.items():
        largest = max(value.abs().max().item(), 1e-3 * max(v.abs().max().item() for v in found.values()))
        off = found | {name: value + 1 if not value.is_floating_point() else value + 1e-8 * largest}
        assert [problem.partition(":")[0] for problem in disagreements(off, expected)] == [name]
        rest = {other: tensor for other, tensor in found.items() if other != name}
        assert disagreements(rest, expected) == [f"missing {name}"]


def test_padded_words_are_read_where_the_published_collation_reads_them() -> None:
    """In `i0` the last text is shorter than the longest; a right index gives other scores."""
    model, inputs = model_of(CASES["hard_texts"]), batch("uniter_itm", "batch_hard_i0")
    right = gather_index(inputs["txt_lens"], inputs["num_bbs"], inputs["input_ids"].shape[1])
    repaired = inputs | {"gather_index": right}
    assert (candidates(model, inputs) - candidates(model, repaired)).abs().max() > 1e-3
    fine = batch("uniter_itm", "batch_hard_i1")
    real = fine["attn_masks"].bool()
    right = gather_index(fine["txt_lens"], fine["num_bbs"], fine["input_ids"].shape[1])
    assert torch.equal(right[real], fine["gather_index"][real])


def test_parity_with_uniter_itm_in_recall() -> None:
    golden, scores = document("uniter_itm", "recall"), tensors("uniter_itm", "recall")["scores"]
    images = torch.tensor([golden["img_ids"].index(golden["txt2img"][text]) for text in golden["txt_ids"]])
    found = recall(scores, images, published=True)
    logged = {f"txt_r{k}": value for k, value in found.text.items()} | {f"img_r{k}": v for k, v in found.image.items()}
    logged |= {"txt_r_mean": sum(found.text.values()) / 3, "img_r_mean": sum(found.image.values()) / 3}
    assert logged | {"r_mean": found.mean} == pytest.approx(golden["published"], rel=1e-12)
    plain = recall(scores, images)
    once = {f"img_r{k}": value for k, value in plain.image.items()}
    assert once == pytest.approx(golden["image_recall_counted_once"], rel=1e-12)
    assert plain.text == found.text
