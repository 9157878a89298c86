"""Retrieval: the margin in a group, and hard negatives found without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.task_batches import batch_of, model_of
from support.uniter_batches import uniter_batch
from torch import Tensor

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.retrieval import UniterForRetrieval, hardest


def candidates(shared: str, rows: int = 6) -> dict[str, Tensor]:
    """One text and `rows` images, or the reverse; the match first."""
    if shared == "text":
        batch = uniter_batch((6,) * rows, (5, 2, 7, 3, 4, 6)[:rows])
        batch["input_ids"] = batch["input_ids"][:1]
        return batch
    batch = uniter_batch((9, 4, 7, 5, 3, 8)[:rows], (5,) * rows)
    for name in ("img_feat", "img_pos_feat"):
        batch[name] = batch[name][:1]
    return batch


def scores(model: UniterForRetrieval, batch: dict[str, Tensor]) -> Tensor:
    rows = len(batch["num_bbs"])
    with torch.no_grad():
        found: Tensor = model.eval()(**{name: t.expand(rows, *t.shape[1:]) for name, t in batch.items()}).logits[:, 0]
    model.train()
    return found


def retrieval() -> UniterForRetrieval:
    model = model_of("retrieval")
    assert isinstance(model, UniterForRetrieval)
    return model


def test_a_group_loses_by_how_far_each_mismatch_comes_near_its_match() -> None:
    model, batch = retrieval().eval(), batch_of("retrieval")
    output = model(**batch)
    match, *others = output.logits.sigmoid().unbind(1)
    by_hand = torch.stack([(0.2 - match + other).clamp(min=0) for other in others], 1)
    torch.testing.assert_close(output.losses, by_hand, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(output.loss, by_hand.mean(1), rtol=1e-13, atol=1e-13)
    batch["sample_size"] = torch.tensor(3)
    assert torch.equal(model(**batch).loss, output.loss)


def test_pairs_without_a_group_have_scores_and_no_loss() -> None:
    model, batch = retrieval().eval(), batch_of("retrieval")
    grouped = model(**batch).logits
    del batch["sample_size"]
    output = model(**batch)
    assert output.loss is None
    assert torch.equal(output.logits, grouped.reshape(-1, 1))


@pytest.mark.parametrize("shared", ["text", "image"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_hardest_are_those_of_the_highest_scores_beside_the_match(shared: str, count: int) -> None:
    model, batch = retrieval(), candidates(shared)
    every = scores(model, batch)
    group = hardest(model, batch, count)
    found = model.eval()(**group).logits
    assert found.shape == (1, 1 + count)
    torch.testing.assert_close(found[0, 0], every[0], rtol=1e-10, atol=1e-12)  # in its place, whatever its score
    best = every[1:].sort(descending=True).values[:count]
    torch.testing.assert_close(found[0, 1:].sort(descending=True).values, best, rtol=1e-10, atol=1e-12)


def test_regions_are_cut_to_the_longest_that_is_kept() -> None:
    group = hardest(retrieval(), candidates("text"), 2)
    longest = int(group["num_bbs"].max())
    assert group["img_feat"].shape[1] == group["img_pos_feat"].shape[1] == longest
    assert group["attn_masks"].shape == group["gather_index"].shape == (3, 6 + longest)


@pytest.mark.parametrize("train", [True, False])
def test_looking_for_them_leaves_no_trace(train: bool) -> None:
    """No gradient, no mode changed, no number drawn; dropout of the training mode decides nothing."""
    model, batch = retrieval().train(train), candidates("text")
    model.uniter.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state, graphs = torch.get_rng_state(), []
    model.rank_output.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    first, second = hardest(model, batch, 3), hardest(model, batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(first[name], second[name]) for name in first if name != "sample_size")
    assert graphs == [False, False]
    assert "img_feat" in batch
    assert len(batch["input_ids"]) == 1


@pytest.mark.parametrize(
    ("spoil", "count", "error", "said"),
    [
        pytest.param(lambda b: b | {"input_ids": b["input_ids"].expand(6, -1)}, 2, DataError, "got 6 and 6", id="both"),
        pytest.param(lambda b: b | {"img_feat": b["img_feat"][:1]}, 2, DataError, "got 1 and 1", id="neither"),
        pytest.param(lambda b: b | {"input_ids": b["input_ids"].expand(2, -1)}, 2, DataError, "got 2 and 6", id="two"),
        pytest.param(lambda b: {n: t for n, t in b.items() if n != "num_bbs"}, 2, DataError, "'num_bbs'", id="lengths"),
        pytest.param(dict, 0, ConfigurationError, r"in 1\.\.5, got 0", id="none-wanted"),
        pytest.param(dict, 6, ConfigurationError, r"in 1\.\.5, got 6", id="more-than-there-are"),
        pytest.param(dict, 2.0, ConfigurationError, r"got 2\.0", id="no-whole-number"),
        pytest.param(
            lambda b: {n: t[:1] for n, t in b.items()}, 1, DataError, "one text and 1 images", id="no-mismatch"
        ),
    ],
)
def test_candidates_that_make_no_group_are_refused(spoil: Any, count: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        hardest(retrieval(), spoil(candidates("text")), count)


@pytest.mark.parametrize("size", [4, 0, -3])
def test_rows_that_are_no_whole_number_of_groups_are_refused(size: int) -> None:
    with pytest.raises(ShapeError, match=f"sample_size = {size}, got 6 rows"):
        retrieval()(**batch_of("retrieval") | {"sample_size": size})


@pytest.mark.parametrize("margin", [0, -1, "much", None])
def test_a_margin_is_above_zero(margin: Any) -> None:
    with pytest.raises(ConfigurationError, match="margin"):
        UniterForRetrieval(UniterConfig.tiny(), margin=margin)
