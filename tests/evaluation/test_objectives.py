"""Objectives and the score, on rows small enough to work by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from advvl.errors import ShapeError
from advvl.evaluation.objectives import (
    OBJECTIVES,
    cosine_distance,
    cross_entropy,
    dlr,
    kl_from_clean,
    margin,
    score,
    squared_distance,
    targeted_cross_entropy,
    targeted_dlr,
    targeted_margin,
)

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
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    losses = OBJECTIVES[name](logits, torch.tensor([[1.0, 0.0, 0.0]]))
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


# --- ratios, targets of the attacker, and distances to the clean answers ---

WIDE = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.5], [0.0, -1.0, 5.0, 4.0, 2.0]], dtype=torch.float64)
RIGHT = F.one_hot(torch.tensor([1, 3]), 5).double()
WANTED = F.one_hot(torch.tensor([3, 0]), 5).double()


def test_the_ratio_is_the_margin_over_the_first_to_the_third_logit() -> None:
    assert dlr(WIDE, RIGHT).tolist() == pytest.approx([(2.0 - 3.0) / (3.0 - 1.0), (5.0 - 4.0) / (5.0 - 2.0)])


def test_the_targeted_ratio_is_the_published_one() -> None:
    expected = [(-1.0 - 3.0) / (3.0 - (1.0 + 0.5) / 2), (0.0 - 4.0) / (5.0 - (2.0 + 0.0) / 2)]
    assert targeted_dlr(WIDE, RIGHT, WANTED).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_ratio_and_the_way_of_its_gradient_do_not_depend_on_the_scale_of_logits(factor: float) -> None:
    for objective in (lambda z: dlr(z, RIGHT), lambda z: targeted_dlr(z, RIGHT, WANTED)):
        ways = []
        for scale in (1.0, factor):
            logits = (WIDE * scale).requires_grad_()
            value = objective(logits)
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            ways.append((value.detach(), gradient / gradient.norm(dim=1, keepdim=True)))
        torch.testing.assert_close(ways[1], ways[0])


def test_ratios_of_equal_logits_are_finite_and_have_a_gradient() -> None:
    for objective in (lambda z: dlr(z, RIGHT), lambda z: targeted_dlr(z, RIGHT, WANTED)):
        logits = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
        value = objective(logits)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.tolist() == [0.0, 0.0]
        assert gradient.isfinite().all()
        assert gradient.abs().sum(1).all()


def test_a_targeted_ratio_without_a_right_or_a_wanted_answer_is_zero() -> None:
    assert targeted_dlr(WIDE, RIGHT, torch.zeros_like(WANTED)).tolist() == [0.0, 0.0]
    logits = WIDE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(targeted_dlr(logits, torch.zeros_like(RIGHT), WANTED).sum(), logits)
    assert gradient.abs().sum() == 0


def test_targeted_objectives_rise_as_the_wanted_answer_wins() -> None:
    assert targeted_margin(WIDE, RIGHT, WANTED).tolist() == [-1.0 - 3.0, 0.0 - 5.0]
    torch.testing.assert_close(targeted_cross_entropy(WIDE, RIGHT, WANTED), WIDE.log_softmax(1)[[0, 1], [3, 0]])
    sure = (100 * RIGHT).requires_grad_()
    for objective in (targeted_margin, targeted_cross_entropy):
        (gradient,) = torch.autograd.grad(objective(sure, RIGHT, WANTED).sum(), sure)
        assert (gradient[[0, 1], [3, 0]] > 0.5).all()  # it does not vanish where the model is sure


def test_kl_from_clean_is_torchs_and_its_clean_side_is_a_constant() -> None:
    logits, clean = WIDE.clone().requires_grad_(), (WIDE + WANTED).requires_grad_()
    found = kl_from_clean(logits, clean)
    expected = F.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.sum(), (logits, clean), allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None
    assert kl_from_clean(WIDE, WIDE).tolist() == [0.0, 0.0]


def test_distances_of_features_are_row_by_row_and_zero_at_the_clean_ones() -> None:
    one, two = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(squared_distance(one, two), (one - two).square().sum((1, 2)))
    torch.testing.assert_close(
        cosine_distance(one, two), 1 - (one * two).sum((1, 2)) / one.flatten(1).norm(dim=1) / two.flatten(1).norm(dim=1)
    )
    assert squared_distance(one, one).tolist() == [0.0] * 3
    torch.testing.assert_close(cosine_distance(one, one), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    zero = torch.zeros_like(one, requires_grad=True)
    (gradient,) = torch.autograd.grad(cosine_distance(zero, two).sum(), zero)
    assert gradient.isfinite().all()
    for objective in (squared_distance, cosine_distance):
        with pytest.raises(ShapeError, match="expected features of one shape"):
            objective(one, two[:2])


def test_a_ratio_of_too_few_answers_is_refused() -> None:
    with pytest.raises(ShapeError, match="expected 3 answers or more, got 2; climb the margin"):
        dlr(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="expected 4 answers or more, got 3; climb the margin"):
        targeted_dlr(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
