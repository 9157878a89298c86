"""The Jensen-Shannon divergence, the distance and the alignment of embeddings, and which rows of them count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.plain import agree, pixel_net, pixels
from torch import Tensor

from advvl import KL, AdversarialTraining, FreeLB, Frozen
from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers import Unperturbed
from advvl.regularizers import Alignment, Distance, JensenShannon

KINDS = pytest.mark.parametrize("kind", [JensenShannon, Distance, Alignment])


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return first, second


def js(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.softmax(-1), b.softmax(-1)
    middle = (p + q) / 2
    return ((p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2).mean()


def test_values_are_the_formulas() -> None:
    a, b = pair(5, 4)
    agree(JensenShannon(1.5)(a, b), 1.5 * js(a, b))
    agree(Distance(1.5)(a, b), 1.5 * (a - b).square().sum(1).sqrt().mean())
    cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    assert (cosine < 0).any()
    agree(Alignment(1.5)(a, b), 1.5 * cosine.clamp(min=0).mean())


def test_js_is_symmetric_bounded_and_zero_at_equality_whatever_the_logits() -> None:
    a, b = pair(5, 4)
    agree(JensenShannon()(a, b), JensenShannon()(b, a))
    apart = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    sides = [side.clone().requires_grad_() for side in apart]
    value = JensenShannon()(*sides)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert all(side.grad.isfinite().all() for side in sides)  # type: ignore[union-attr]
    assert JensenShannon()(a, a).abs() < 1e-15


@KINDS
def test_gradients_flow_into_both_sides_and_are_right(kind: Any) -> None:
    a, b = (side.requires_grad_() for side in pair(3, 4))
    assert torch.autograd.gradcheck(kind(), (a, b))


@pytest.mark.parametrize("kind", [JensenShannon, Distance])
def test_value_and_gradients_vanish_at_equality(kind: Any) -> None:
    assert kind().vanishes_at_equality
    a = pair(3, 4)[0].requires_grad_()
    b = a.detach().clone().requires_grad_()
    value = kind()(a, b)
    value.backward()
    assert all(found.abs().max() < 1e-15 for found in (value, a.grad, b.grad))  # type: ignore[union-attr]


def test_alignment_is_largest_at_equality_and_declares_it() -> None:
    a, _ = pair(3, 4)
    agree(Alignment()(a, a), torch.ones((), dtype=torch.float64))
    assert not Alignment().vanishes_at_equality


@KINDS
def test_rows_that_do_not_count_may_be_anything(kind: Any) -> None:
    a, b = pair(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = kind()(a[mask], b[mask])
    b[~mask] = torch.inf
    a[~mask] = torch.nan
    a.requires_grad_()
    value = kind()(a, b, mask)
    agree(value, expected)
    value.backward()
    assert a.grad is not None
    assert not a.grad[~mask].any()
    assert kind()(a, b, torch.zeros_like(mask)) == 0


@KINDS
def test_half_precision_is_compared_wide(kind: Any) -> None:
    a, b = pair(3, 4, dtype=torch.float16)
    found = kind()(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), kind()(a.double(), b.double()), rtol=1e-5, atol=1e-6)


@KINDS
def test_an_empty_batch_is_zero(kind: Any) -> None:
    assert kind()(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_one_class_is_refused() -> None:
    with pytest.raises(ShapeError, match="two classes or more"):
        JensenShannon()(torch.zeros(3, 1), torch.zeros(3, 1))


# ---- rows -------------------------------------------------------------------------------------------------------------


def test_rows_say_which_of_what_is_read_count() -> None:
    target, batch = pixel_net(), pixels()
    other = pixel_net()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.1)
    reads = {"reads": lambda outputs: outputs["features"]}
    chosen = torch.tensor([True, False, False, True])
    penalty = Distance(2.0, reference=Frozen(other.model), rows=lambda _: chosen, **reads)
    report = AdversarialTraining(Unperturbed(), FreeLB(1), penalty).step(target, batch)
    ours, theirs = (net.model(**batch)["features"][chosen] for net in (target, other))
    assert report.regularization is not None
    agree(report.regularization, 2 * (ours - theirs).norm(dim=1).mean().detach())


def test_rows_take_the_place_of_positions_for_logits() -> None:
    chosen = torch.tensor([True, False, False, True])
    everywhere, some = (
        pixel_net(positions=lambda _: torch.ones(4, dtype=torch.bool)),
        pixel_net(positions=lambda _: chosen),
    )
    origin = Frozen.copy_of(pixel_net().model)
    with torch.no_grad():
        for target in (everywhere, some):
            for parameter in target.model.parameters():
                parameter.add_(0.1)
    by_rows = AdversarialTraining(Unperturbed(), FreeLB(1), KL(reference=origin, rows=lambda _: chosen))
    by_positions = AdversarialTraining(Unperturbed(), FreeLB(1), KL(reference=origin))
    first, second = by_rows.step(everywhere, pixels()), by_positions.step(some, pixels())
    assert first.regularization is not None
    agree(first.regularization, second.regularization)


def test_rows_that_are_no_function_or_no_rows_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="rows as a function of the batch"):
        AdversarialTraining(Unperturbed(), FreeLB(1), Distance(rows=torch.ones(4)))  # type: ignore[arg-type]
    wrong = Distance(rows=lambda _: torch.ones(3, dtype=torch.bool), reads=lambda outputs: outputs["features"])
    with pytest.raises(ShapeError, match=r"a mask of shape \(4,\), got \(3,\)"):
        AdversarialTraining(Unperturbed(), FreeLB(1), wrong).step(pixel_net(), pixels())


def test_one_clean_pass_is_plain_training() -> None:
    """Nothing is perturbed, so that one pass is not refused, and no site has to fire."""
    target, batch = pixel_net(), pixels()
    report = AdversarialTraining(Unperturbed(), FreeLB(1)).step(target, batch)
    theirs = pixel_net().model
    theirs(**batch)["loss"].backward()
    for mine, expected in zip(target.model.parameters(), theirs.parameters(), strict=True):
        agree(mine.grad, expected.grad)
    assert (report.passes, report.delta_norms) == (1, {})
