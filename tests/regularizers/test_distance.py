"""The squared distance is its formula, in fp32 at least, over the rows that count."""

from __future__ import annotations

import math

import pytest
import torch

from advvl import KL, Frozen, SquaredDistance, SymmetricKL
from advvl.errors import ConfigurationError, ShapeError

CLEAN, PERTURBED = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 6.0], [0.0, 1.0]])


def test_a_distance_by_hand() -> None:
    assert SquaredDistance()(CLEAN, PERTURBED).item() == (9 + 16 + 0 + 1) / 2
    assert SquaredDistance(0.5)(CLEAN, PERTURBED).item() == 6.5
    assert SquaredDistance()(CLEAN[None], PERTURBED[None]).item() == 13.0  # (B, T, D): a row is a position


def test_its_gradient_flows_into_both_sides() -> None:
    clean, perturbed = CLEAN.double().requires_grad_(), PERTURBED.double().requires_grad_()
    assert torch.autograd.gradcheck(SquaredDistance(1.5), (clean, perturbed))
    into_clean, into_perturbed = torch.autograd.grad(SquaredDistance()(clean, perturbed), [clean, perturbed])
    assert torch.equal(into_perturbed, perturbed.detach() - clean.detach())
    assert torch.equal(into_clean, -into_perturbed)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    clean, perturbed = CLEAN.clone(), PERTURBED.clone().requires_grad_()
    clean[1] = math.nan
    for mask in (torch.tensor([True, False]), torch.tensor([1, 0])):
        value = SquaredDistance()(clean, perturbed, mask)
        assert value.item() == 25.0
        (gradient,) = torch.autograd.grad(value, perturbed)
        assert torch.equal(gradient, torch.tensor([[6.0, 8.0], [0.0, 0.0]]))
    assert SquaredDistance()(clean, perturbed, torch.zeros(2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    """300² overflows fp16, and bf16 holds three digits."""
    clean, perturbed = torch.zeros(1, 2, dtype=dtype), torch.tensor([[300.0, 1.0]], dtype=dtype)
    value = SquaredDistance()(clean, perturbed)
    assert value.dtype == torch.float32
    assert value.item() == 90001.0


def test_no_rows_cost_nothing() -> None:
    assert SquaredDistance()(CLEAN[:0], PERTURBED[:0]).item() == 0


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"embeddings of one shape, got \(2, 2\) and \(1, 2\)"):
        SquaredDistance()(CLEAN, PERTURBED[:1])
    with pytest.raises(ShapeError, match=r"expected a mask of shape \(2,\), got \(2, 2\)"):
        SquaredDistance()(CLEAN, PERTURBED, CLEAN.bool())
    with pytest.raises(
        ShapeError, match="expected embeddings with one row or more and a last axis, got a single number"
    ):
        SquaredDistance()(CLEAN.sum(), PERTURBED.sum())
    with pytest.raises(ConfigurationError, match="expected a finite weight above 0, got '1'"):
        SquaredDistance("1")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [SquaredDistance, KL, SymmetricKL])
def test_a_reference_has_no_gradient_to_get(make: type[SquaredDistance]) -> None:
    reference = Frozen(torch.nn.Linear(1, 1))
    assert make().through_clean
    assert not make(reference=reference).through_clean
    assert not make(reference=reference, on="clean", reads="a.module").through_clean
    assert make(2.0, reads="a.module") == make(2.0, reads="a.module") != make(2.0, reads="another")
    with pytest.raises(TypeError):
        make(1.0, "softmax", False, "clean||perturbed", "a.module")  # the three are said by name


def test_scores_of_a_regression_are_compared_row_by_row() -> None:
    clean, perturbed = torch.tensor([30.0, -20.0]), torch.tensor([50.0, -40.0])
    assert SquaredDistance()(clean, perturbed).item() == 400.0
    assert SquaredDistance()(clean[:, None], perturbed[:, None]).item() == 400.0
    assert SquaredDistance()(clean, perturbed, torch.tensor([True, False])).item() == 400.0


def test_features_may_come_first() -> None:
    clean, perturbed = CLEAN.T.view(1, 2, 1, 2), PERTURBED.T.view(1, 2, 1, 2)
    assert SquaredDistance(axis=1)(clean, perturbed).item() == SquaredDistance()(CLEAN, PERTURBED).item()
    with pytest.raises(ShapeError, match=r"axis of the classes for embeddings of \(1, 2, 1, 2\), got None"):
        SquaredDistance()(clean, perturbed)
