"""Divergences equal their formulas, vanish at equality, and stay finite at any gap between logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr
from scipy.special import softmax as scipy_softmax
from support.compare import TOLERANCE
from torch import Tensor

from advvl import KL, Regularizer, SymmetricKL
from advvl.errors import ConfigurationError, ShapeError

HEADS = ["softmax", "sigmoid"]
KINDS = {
    "symmetric": SymmetricKL,
    "clean-first": lambda **options: KL(direction="clean||perturbed", **options),
    "perturbed-first": lambda **options: KL(direction="perturbed||clean", **options),
}
each_head = pytest.mark.parametrize("head", HEADS)
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * drawn).to(dtype)


def kl(p: np.ndarray, q: np.ndarray, head: str) -> np.ndarray:
    """KL(p‖q) of each row, by scipy, from logits."""
    if head == "softmax":
        return rel_entr(scipy_softmax(p, -1), scipy_softmax(q, -1)).sum(-1)
    on, off = rel_entr(expit(p), expit(q)), rel_entr(expit(-p), expit(-q))
    return (on + off).sum(-1)


def expected(kind: str, clean: Tensor, perturbed: Tensor, head: str) -> np.ndarray:
    c, p = clean.double().numpy(), perturbed.double().numpy()
    forward, backward = kl(c, p, head), kl(p, c, head)
    return {"symmetric": forward + backward, "clean-first": forward, "perturbed-first": backward}[kind]


@each_head
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (1, 2), (3, 4, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
def test_a_divergence_is_its_formula(head: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    clean, perturbed = logits(*shape, seed=1, dtype=dtype), logits(*shape, seed=2, dtype=dtype)
    value = KINDS[kind](weight=1.5, head=head)(clean, perturbed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wide
    assert value.shape == ()
    assert value.item() == pytest.approx(
        1.5 * expected(kind, clean, perturbed, head).mean(), rel=TOLERANCE[wide], abs=1e-7
    )


def test_a_divergence_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p‖q) = ln 2 − H(p) with H(p) = 2 ln 2 − ¾ ln 3."""
    p, q = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log(), torch.zeros(1, 2, dtype=torch.float64)
    assert KL()(p, q).item() == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-12)
    assert KL(direction="perturbed||clean")(p, q).item() == pytest.approx(math.log(2) - 0.5 * math.log(3), rel=1e-12)
    assert SymmetricKL()(p, q).item() == pytest.approx(0.25 * math.log(3), rel=1e-12)


@each_head
@each_kind
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
def test_at_equality_value_and_gradients_are_zero(head: str, make: type[Regularizer], dtype: torch.dtype) -> None:
    clean = logits(5, 7, seed=1, dtype=dtype).requires_grad_()
    perturbed = clean.detach().clone().requires_grad_()
    value = make(head=head)(clean, perturbed)
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, [clean, perturbed]):
        assert gradient.abs().max() <= (1e-16 if dtype == torch.float64 else 1e-7)


@each_head
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gap", [20.0, 104.0, 1e4])
def test_any_gap_between_logits_gives_finite_values_and_gradients(
    head: str, make: type[Regularizer], dtype: torch.dtype, gap: float
) -> None:
    clean = torch.tensor([[gap, 0.0, -gap], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    perturbed = torch.tensor([[-gap, 0.0, gap], [gap, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    value = make(head=head)(clean, perturbed)
    assert gap / 4 < value.item() < 8 * gap
    gradients = torch.autograd.grad(value, [clean, perturbed])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)  # that of a saturated first argument is zero


@each_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_divergence_of_nearly_equal_logits_is_not_negative(head: str, dtype: torch.dtype) -> None:
    clean = torch.tensor([[10.0, 0.0, 0.0]], dtype=dtype)
    value = SymmetricKL(head=head)(clean, torch.nextafter(clean.double(), torch.tensor(99.0).double()).to(dtype) + 0.01)
    assert value.item() >= 0


@each_head
def test_the_symmetric_divergence_is_symmetric(head: str) -> None:
    clean, perturbed = logits(5, 7, seed=1), logits(5, 7, seed=2)
    assert SymmetricKL(head=head)(clean, perturbed) == SymmetricKL(head=head)(perturbed, clean)
    both = KL(head=head)(clean, perturbed) + KL(head=head, direction="perturbed||clean")(clean, perturbed)
    torch.testing.assert_close(SymmetricKL(head=head)(clean, perturbed), both, rtol=1e-12, atol=0.0)
    assert KL(head=head)(clean, perturbed) == KL(head=head, direction="perturbed||clean")(perturbed, clean)


@each_head
def test_the_two_directions_differ(head: str) -> None:
    clean, perturbed = logits(5, 7, seed=1), logits(5, 7, seed=2)
    one, two = KL(head=head)(clean, perturbed), KL(head=head, direction="perturbed||clean")(clean, perturbed)
    assert abs(one - two) > 0.1


@each_head
@each_kind
def test_gradients_are_those_of_the_value(head: str, make: type[Regularizer]) -> None:
    clean, perturbed = logits(3, 4, seed=1).requires_grad_(), logits(3, 4, seed=2).requires_grad_()
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda c, p: make(head=head)(c, p, mask), (clean, perturbed))


@each_head
@each_kind
def test_a_detached_clean_branch_gets_no_gradient(head: str, make: type[Regularizer]) -> None:
    clean, perturbed = logits(3, 4, seed=1).requires_grad_(), logits(3, 4, seed=2).requires_grad_()
    both, detached = make(head=head), make(head=head, detach_clean=True)
    assert both.through_clean
    assert not detached.through_clean
    assert both(clean, perturbed) == detached(clean, perturbed)
    into_clean, into_perturbed = torch.autograd.grad(detached(clean, perturbed), [clean, perturbed], allow_unused=True)
    assert into_clean is None
    full = torch.autograd.grad(both(clean, perturbed), [clean, perturbed])
    torch.testing.assert_close(into_perturbed, full[1], rtol=1e-12, atol=0.0)
    assert full[0].abs().min() > 0


def test_the_full_gradient_is_twice_that_of_smarts_detached_targets_near_equality() -> None:
    clean = logits(3, 4, seed=1)
    perturbed = (clean + 1e-6 * logits(3, 4, seed=2)).requires_grad_()
    full = torch.autograd.grad(SymmetricKL()(clean, perturbed), perturbed)[0]
    smart = torch.autograd.grad(KL(detach_clean=True)(clean, perturbed), perturbed)[0]
    torch.testing.assert_close(full, 2 * smart, rtol=0.0, atol=1e-5 * full.abs().max().item())


@each_head
@each_kind
def test_a_mask_averages_over_the_rows_it_keeps(head: str, make: type[Regularizer]) -> None:
    clean, perturbed = logits(3, 4, 5, seed=1), logits(3, 4, 5, seed=2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    kept = make(head=head)(clean[mask.bool()], perturbed[mask.bool()])
    for given in (mask, mask.bool()):
        torch.testing.assert_close(make(head=head)(clean, perturbed, given), kept, rtol=1e-12, atol=0.0)
    clean.requires_grad_()
    gradient = torch.autograd.grad(make(head=head)(clean, perturbed, mask), clean)[0]
    assert not gradient[~mask.bool()].any()
    assert gradient[mask.bool()].any()


@each_head
@each_kind
def test_nothing_to_compare_costs_nothing(head: str, make: type[Regularizer]) -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    assert make(head=head)(empty, empty.detach()).item() == 0
    row = torch.ones(2, 4, requires_grad=True)
    none = make(head=head)(row, 2 * row, torch.zeros(2, dtype=torch.bool))
    assert none.item() == 0
    assert not torch.autograd.grad(none, row)[0].any()


@each_kind
def test_the_penalty_is_proportional_to_its_weight(make: type[Regularizer]) -> None:
    clean, perturbed = logits(3, 4, seed=1), logits(3, 4, seed=2)
    torch.testing.assert_close(make(weight=3.0)(clean, perturbed), 3 * make()(clean, perturbed), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        pytest.param("expected a finite weight above 0, got 0.*regularizer=None", lambda: KL(0.0), id="zero"),
        pytest.param("expected a finite weight above 0, got -1", lambda: SymmetricKL(-1.0), id="negative"),
        pytest.param("expected a finite weight above 0, got nan", lambda: SymmetricKL(math.nan), id="nan"),
        pytest.param("expected a finite weight above 0, got inf", lambda: SymmetricKL(math.inf), id="inf"),
        pytest.param(
            r"expected head to be one of \('softmax', 'sigmoid'\), got 'tanh'", lambda: KL(head="tanh"), id="head"
        ),
        pytest.param(r"expected direction to be one of .*, got 'both'", lambda: KL(direction="both"), id="direction"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(message: str, make: object) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_logits_or_a_mask_of_another_shape_or_kind_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"logits of one shape, got \(3, 4\) and \(2, 4\)"):
        KL()(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"expected a mask of shape \(3,\), got \(3, 4\)"):
        KL()(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(ShapeError, match=r"expected a mask of bool or 0/1, .*, got torch.float32"):
        KL()(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0.0, -torch.inf, 0.0]))


def test_rows_that_do_not_count_may_hold_anything() -> None:
    clean, perturbed = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = SymmetricKL()(clean, perturbed, mask)
    for x in (clean, perturbed):
        x[~mask] = math.nan
        x.requires_grad_()
    found = SymmetricKL()(clean, perturbed, mask)
    found.backward()
    torch.testing.assert_close(found, expected)
    assert clean.grad is not None
    assert clean.grad.isfinite().all()


@pytest.mark.parametrize("make", [KL, SymmetricKL])
def test_one_class_has_no_softmax_to_compare(make: type[Regularizer]) -> None:
    one = torch.randn(4, 1)
    with pytest.raises(ShapeError, match="two classes or more for head='softmax'"):
        make()(one, one)
    assert make(head="sigmoid")(one, -one) > 0


@each_head
@each_kind
def test_classes_may_come_first(make: Any, head: str) -> None:
    clean, perturbed = logits(2, 3, 4, 5, seed=1), logits(2, 3, 4, 5, seed=2)
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)) > 0.5
    for counts in (None, mask):
        found = make(head=head, axis=1)(clean, perturbed, counts)
        moved = make(head=head, axis=-1)(clean.movedim(1, -1), perturbed.movedim(1, -1), counts)
        torch.testing.assert_close(found, moved, rtol=1e-14, atol=0)


@each_kind
def test_the_axis_of_the_classes_of_a_segmentation_has_to_be_said(make: Any) -> None:
    with pytest.raises(ShapeError, match=r"axis of the classes for logits of \(2, 3, 4, 5\), got None; pass axis=1"):
        make()(logits(2, 3, 4, 5, seed=1), logits(2, 3, 4, 5, seed=2))
    with pytest.raises(ShapeError, match=r"expected logits with an axis 2, got \(2, 3\); correct"):
        make(axis=2)(logits(2, 3, seed=1), logits(2, 3, seed=2))
    with pytest.raises(ConfigurationError, match="axis of the classes as a whole number, or None, got True"):
        make(axis=True)


@each_kind
def test_one_score_a_row_is_one_yes_or_no_a_row(make: Any) -> None:
    clean, perturbed = logits(6, seed=1), logits(6, seed=2)
    flat, column = make(head="sigmoid")(clean, perturbed), make(head="sigmoid")(clean[:, None], perturbed[:, None])
    assert torch.equal(flat, column)
    mask = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    assert torch.equal(make(head="sigmoid")(clean, perturbed, mask), make(head="sigmoid")(clean[mask], perturbed[mask]))
    for shape in ((6,), (6, 1)):
        with pytest.raises(ShapeError, match=r"two classes .* got \(6,( 1)?\); use SquaredDistance\(\) for regression"):
            make()(clean.view(shape), perturbed.view(shape))
