"""Referring expressions: which regions count, and which wrong one is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.task_batches import batch_of, model_of
from torch import Tensor

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.referring import UniterForReferringExpressions, draw_regions

REAL = torch.arange(6) < torch.tensor([4, 6, 2])[:, None]
TARGETS = torch.tensor([1, 5, 0])
SCORES = torch.tensor([[3.0, 9.0, 4.0, 1.0, 8.0, 8.0], [1.0, 2.0, 7.0, 0.0, 3.0, 9.0], [5.0, -2.0, 9.0, 9.0, 9.0, 9.0]])


def test_the_hard_draw_is_the_best_wrong_region_of_a_row() -> None:
    assert draw_regions(SCORES, TARGETS, REAL, hard_ratio=1.0).tolist() == [2, 2, 1]
    close = SCORES.double() + torch.tensor([0, 0, 1e-12, 0, 0, 0], dtype=torch.float64)  # beyond float32
    assert draw_regions(close.index_fill(1, torch.tensor([0]), 4.0), TARGETS, REAL, hard_ratio=1.0)[0] == 2


def test_other_draws_are_uniform_over_the_wrong_regions() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_regions(SCORES, TARGETS, REAL, hard_ratio=0.0, generator=generator) for _ in range(1500)])
    for row, wrong in enumerate(([0, 2, 3], [0, 1, 2, 3, 4], [1])):
        counts = torch.bincount(draws[:, row], minlength=6)
        assert counts.nonzero()[:, 0].tolist() == wrong
        expected = 1500 / len(wrong)
        assert (counts[wrong] - expected).abs().max() < 5 * expected**0.5


def test_the_ratio_says_how_often_a_draw_is_hard() -> None:
    generator, wide = torch.Generator().manual_seed(0), torch.ones(1, 200, dtype=torch.bool)
    scores = torch.zeros(1, 200)
    scores[0, 7] = 1
    hard = [
        draw_regions(scores, TARGETS[:1], wide, hard_ratio=0.3, generator=generator).item() == 7 for _ in range(2000)
    ]
    assert sum(hard) / 2000 == pytest.approx(0.3 + 0.7 / 199, abs=0.04)


def test_the_same_generator_draws_the_same_regions_and_touches_no_other() -> None:
    state = torch.get_rng_state()
    draws = [
        draw_regions(SCORES, TARGETS, REAL, hard_ratio=0.5, generator=torch.Generator().manual_seed(4)) for _ in "ab"
    ]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_with_one_region_is_refused_and_not_searched_for_ever() -> None:
    one = REAL.clone()
    one[2, 1:] = False
    for ratio in (0.0, 1.0):
        with pytest.raises(DataError, match=r"two regions or more in each row.*rows \[2\].*loss=\"cls\""):
            draw_regions(SCORES, TARGETS, one, hard_ratio=ratio)
    batch = batch_of("re-rank")
    batch["num_bbs"] = torch.tensor([5, 7, 4, 1])
    batch["targets"] = torch.tensor([3, 0, 2, 0])
    with pytest.raises(DataError, match=r"rows \[3\]"):
        model_of("re-rank")(**batch)
    assert model_of("re-cls")(**batch).loss[3] == 0  # the only region, in a softmax


def test_a_ranking_loss_is_the_margin_by_hand() -> None:
    model, batch = model_of("re-rank").eval(), batch_of("re-rank")
    batch["negatives"] = torch.tensor([1, 6, 0, 0])
    output = model(**batch)
    chances = output.logits.sigmoid()
    rows = torch.arange(4)
    by_hand = (0.2 + chances[rows, batch["negatives"]] - chances[rows, batch["targets"][:, 0]]).clamp(min=0)
    torch.testing.assert_close(output.loss, by_hand, rtol=1e-13, atol=1e-13)


def test_draws_in_a_forward_come_from_torchs_own_generator() -> None:
    model, batch = model_of("re-rank").eval(), batch_of("re-rank")
    model.hard_ratio = 0.0
    losses = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss)
    assert torch.equal(losses[0], losses[1])
    assert any(not torch.equal(losses[0], other) for other in losses[2:])


def test_padded_regions_get_no_score_and_no_gradient() -> None:
    model, batch = model_of("re-cls"), batch_of("re-cls", more_regions=2)
    features = batch["img_feat"].requires_grad_()
    output = model(**batch)
    output.loss.sum().backward()
    real = torch.arange(features.shape[1]) < batch["num_bbs"][:, None]
    assert (output.logits[~real] == -10000).all()
    assert (output.logits[real] > -100).all()
    assert features.grad is not None
    assert not features.grad[~real].any()


@pytest.mark.parametrize(
    ("field", "value", "error", "said"),
    [
        ("targets", torch.tensor([3, 0, 2]), ShapeError, r"targets of shape \(B,\) = \(4,\)"),
        ("targets", torch.tensor([3.0, 0, 2, 1]), DataError, "whole numbers"),
        ("targets", torch.tensor([3, 0, 2, 7]), DataError, r"targets in 0\.\.6, got \[7\]"),
        ("targets", torch.tensor([3, 0, 2, -1]), DataError, r"got \[-1\]"),
        ("targets", torch.tensor([3, 0, 2, 4]), DataError, r"real regions, got padding in rows \[3\]"),
        ("obj_masks", torch.zeros(4, 3), ShapeError, r"obj_masks of shape \(B, R\) = \(4, 7\), got \(4, 3\)"),
        ("negatives", torch.tensor([3, 0, 2]), ShapeError, "targets of shape"),
    ],
)
def test_fields_that_do_not_fit_are_refused(field: str, value: Tensor, error: type[Exception], said: str) -> None:
    task = "re-rank" if field == "negatives" else "re-cls"
    with pytest.raises(error, match=said):
        model_of(task)(**batch_of(task) | {field: value})


@pytest.mark.parametrize(
    "options",
    [{"mlp": 3}, {"mlp": "2"}, {"loss": "margin"}, {"margin": 0}, {"hard_ratio": 1.1}, {"hard_ratio": None}],
    ids=str,
)
def test_options_that_make_no_model_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        UniterForReferringExpressions(UniterConfig.tiny(), **options)
