"""Objectives and the score, on rows small enough to work by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from advvl.errors import ShapeError
from advvl.evaluation.objectives import OBJECTIVES, cross_entropy, margin, score

LOGITS = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
TARGETS = torch.tensor([[0.0, 0.3, 0.9], [1.0, 0.0, 0.0], [0.6, 0.0, 0.3]], dtype=torch.float64)


def test_the_score_is_the_target_of_the_largest_logit_and_the_first_of_equals() -> None:
    assert score(LOGITS, TARGETS).tolist() == [0.3, 0.0, 0.6]


def test_the_margin_is_the_best_wrong_logit_minus_the_best_right_one() -> None:
    assert margin(LOGITS, TARGETS).tolist() == [1.0 - 3.0, 5.0 - 0.0, 1.0 - 1.0]


def test_cross_entropy_is_against_the_targets_normalised() -> None:
    shares = TARGETS / torch.tensor([[1.2], [1.0], [0.9]], dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(LOGITS, TARGETS), F.cross_entropy(LOGITS, shares, reduction="none"))


def test_cross_entropy_of_one_right_answer_is_the_usual_one() -> None:
    labels = torch.tensor([2, 0, 1])
    hard = F.one_hot(labels, 3).double()
    torch.testing.assert_close(cross_entropy(LOGITS, hard), F.cross_entropy(LOGITS, labels, reduction="none"))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_row_with_no_right_answer_has_an_objective_and_a_gradient_of_zero(name: str) -> None:
    targets = TARGETS.clone()
    targets[1] = 0
    logits = LOGITS.clone().requires_grad_()
    losses = OBJECTIVES[name](logits, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses[1] == 0
    assert gradient[1].tolist() == [0.0, 0.0, 0.0]
    assert gradient[0].abs().sum() > 0
    assert gradient[2].abs().sum() > 0
    assert score(logits, targets)[1] == 0


def test_the_margin_of_a_row_whose_every_answer_is_right_is_zero() -> None:
    logits = LOGITS.clone().requires_grad_()
    losses = margin(logits, torch.ones_like(TARGETS))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert gradient.abs().sum() == 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_are_finite_where_the_model_is_sure(name: str) -> None:
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    losses = OBJECTIVES[name](logits, torch.tensor([[1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert math.isfinite(losses.item())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_no_row_depends_on_another(name: str) -> None:
    whole = OBJECTIVES[name](LOGITS, TARGETS)
    alone = torch.cat([OBJECTIVES[name](LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("function", [score, margin, cross_entropy])
@pytest.mark.parametrize(("logits", "targets"), [((2, 3), (2, 4)), ((3,), (3,)), ((2, 3), (3,))])
def test_logits_and_targets_of_other_shapes_are_refused(
    function: object, logits: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match=r"expected logits and targets of one shape \(B, A\)"):
        function(torch.zeros(logits), torch.zeros(targets))  # type: ignore[operator]
