"""Perturbations through a discretiser: padding stays, gradients pass straight through, what does not fit is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.toy import toy, toy_batch
from torch import nn

from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    DiscretePerturber,
    FreeLB,
    Place,
    Sometimes,
    Uniform,
    Zero,
    adapt,
)
from advvl.errors import ConfigurationError, ShapeError
from advvl.runtime.descriptions import described

ASCENT = Ascent(L2(0.5), step_size=0.2)
X = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
PLACE = Place(X, MASK)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.round()


@pytest.mark.parametrize("perturbed", ["after", "before"])
def test_padding_stays_to_the_bit_and_gradients_pass_straight_through(perturbed: Any) -> None:
    perturber = DiscretePerturber(rounded, perturbed=perturbed, image=ASCENT)
    x, delta = X.clone().requires_grad_(), (0.1 * MASK.unsqueeze(-1) * torch.ones_like(X)).requires_grad_()
    seen = perturber.apply("image", PLACE, x, delta)
    expected = X.round() + 0.1 if perturbed == "after" else (X + 0.1).round()
    torch.testing.assert_close(seen[MASK], expected[MASK])
    assert torch.equal(seen[~MASK], X[~MASK])
    weights = torch.arange(30.0, dtype=torch.float64).view(3, 5, 2)
    (seen * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)
    torch.testing.assert_close(delta.grad, weights * MASK.unsqueeze(-1))


@pytest.mark.parametrize("perturbed", ["after", "before"])
def test_a_pass_that_does_not_move_the_perturbation_sees_codes(perturbed: Any) -> None:
    perturber = DiscretePerturber(rounded, perturbed=perturbed, image=ASCENT)
    seen = perturber.apply("image", PLACE, X, torch.full_like(X, 0.6))[MASK]
    assert torch.equal(seen, seen.round())


@pytest.mark.parametrize("maximizer", [PGD(2), FreeLB(2)], ids=["PGD", "FreeLB"])
@pytest.mark.parametrize("dropout", ["fresh", "shared"])
def test_the_clean_pass_sees_the_tensor_and_not_its_codes(maximizer: Any, dropout: Any) -> None:
    target, batch, traces = toy(), toy_batch(), []
    method = AdversarialTraining(
        DiscretePerturber(torch.zeros_like, perturbed="before", image=ASCENT),
        maximizer,
        clean_weight=1.0,
        dropout=dropout,
    )
    method.step(target, batch, trace=traces.append)
    expected = target.model(**batch)["logits"]
    torch.testing.assert_close(traces[0].logits, expected)
    blind = target.model(**{**batch, "regions": batch["regions"] * ~batch["region_mask"].unsqueeze(-1)})["logits"]
    torch.testing.assert_close(traces[-1].logits, blind)


def test_a_start_comes_with_its_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [Sometimes(Uniform(1.0), probability=0.3).make(L2(), PLACE, generator) for _ in range(200)]
    assert 40 < sum(bool(start.any()) for start in starts) < 80
    assert not Sometimes(Uniform(1.0), probability=0.0).make(L2(), PLACE, None).any()
    assert Sometimes(Uniform(1.0), probability=1.0).make(L2(), PLACE, None).all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DiscretePerturber(3, image=ASCENT), "discretise"),
        (lambda: DiscretePerturber(nn.Identity(), image=ASCENT), r"Identity in eval mode, got training mode"),
        (lambda: DiscretePerturber(rounded, perturbed="inside", image=ASCENT), r"'after' or 'before', got 'inside'"),
        (lambda: DiscretePerturber(rounded), "at least one modality"),
        (lambda: Sometimes(0.3, probability=0.3), "expected a start"),
        (lambda: Sometimes(Zero(), probability=1.3), r"a probability in \[0, 1\], got 1.3"),
    ],
)
def test_what_makes_no_sense_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        made()


@pytest.mark.parametrize("found", [torch.zeros(3, 4, 2), None], ids=["shape", "None"])
def test_codes_of_another_shape_are_refused(found: Any) -> None:
    perturber = DiscretePerturber(lambda x: found, image=ASCENT)
    with pytest.raises(ShapeError, match=r"expected discretise to give a tensor of 'image' of shape \(3, 5, 2\)"):
        perturber.apply("image", PLACE, X, torch.zeros_like(X))
    with pytest.raises(ShapeError, match=r"perturbation of 'image' of shape \(3, 5, 2\), got \(1, 5, 2\)"):
        perturber.apply("image", PLACE, X, torch.zeros(1, 5, 2))


@pytest.mark.parametrize("found", [X.round().long(), X.round().bool()], ids=["long", "bool"])
def test_codes_that_are_no_floats_are_refused(found: Any) -> None:
    perturber = DiscretePerturber(lambda x: found, image=ASCENT)
    with pytest.raises(ShapeError, match=r"of shape \(3, 5, 2\), got torch\.(int64|bool)"):
        perturber.apply("image", PLACE, X, torch.zeros_like(X))


@pytest.mark.parametrize("perturbed", ["after", "before"])
def test_codes_that_leave_the_box_are_refused_and_padding_may(perturbed: Any) -> None:
    boxed = Ascent(L2(0.5), step_size=0.2, box=(0.0, 1.0))
    inside = torch.where(MASK.unsqueeze(-1), X.sigmoid(), 9.0)
    for shift in (0.7, -0.7):
        perturber = DiscretePerturber(lambda x, shift=shift: x + shift, perturbed=perturbed, image=boxed)
        with pytest.raises(
            ConfigurationError, match=r"keep 'image' in its box \[0, 1\], got .* % of its entries outside"
        ):
            perturber.apply("image", Place(inside, MASK), inside, torch.zeros_like(X))
    rounding = DiscretePerturber(lambda x: x.clamp(0, 1) * (1 + 1e-16), perturbed=perturbed, image=boxed)
    rounding.apply("image", Place(inside, MASK), inside, torch.zeros_like(X))


def test_codes_are_of_full_precision_under_autocast() -> None:
    codes = nn.Linear(2, 2).eval()
    perturber, place = DiscretePerturber(codes, image=ASCENT), Place(X.float(), MASK)
    expected = perturber.apply("image", place, place.x, torch.zeros_like(place.x))
    with torch.autocast("cpu", torch.bfloat16):
        found = perturber.apply("image", Place(X.float(), MASK), place.x, torch.zeros_like(place.x))
    assert torch.equal(found, expected)


def test_a_model_in_half_precision_costs_no_more_codes_and_reports_no_share_that_survives() -> None:
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.dtype)
        return x.round()

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to(torch.bfloat16)
    target = adapt(model, {"image": "0:input"}, call=lambda model, batch: model(batch["x"]))
    batch = {"x": torch.randn(4, 12).bfloat16(), "y": torch.tensor([0, 1, 2, 0])}
    report = AdversarialTraining(DiscretePerturber(counted, image=ASCENT), PGD(1)).step(
        target, batch, loss=lambda out, batch: nn.functional.cross_entropy(out.float(), batch["y"])
    )
    assert calls == [torch.float32] * 2
    assert not report.effective


def test_a_module_on_another_device_is_refused_in_words() -> None:
    perturber = DiscretePerturber(nn.Linear(2, 2, device="meta").eval(), image=ASCENT)
    with pytest.raises(
        ConfigurationError, match=r"expected the discretiser Linear on cpu, as 'image' is, got meta; move"
    ):
        perturber.apply("image", PLACE, X, torch.zeros_like(X))


def test_it_is_pickled_and_described_without_what_it_has_seen() -> None:
    perturber = DiscretePerturber(rounded, image=ASCENT)
    text, size = described(perturber), len(pickle.dumps(perturber))
    seen = perturber.apply("image", PLACE, X, torch.full_like(X, 0.6))
    assert described(perturber) == text
    assert len(pickle.dumps(perturber)) == size
    for again in (pickle.loads(pickle.dumps(perturber)), copy.deepcopy(perturber)):
        assert torch.equal(again.apply("image", PLACE, X, torch.full_like(X, 0.6)), seen)


def test_its_repr_names_it() -> None:
    assert "perturbed='after', EmbeddingPerturber(image=Ascent(" in repr(DiscretePerturber(rounded, image=ASCENT))
