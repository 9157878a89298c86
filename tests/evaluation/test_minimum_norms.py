"""Minimum norms: the known distances of a linear model, verified, with a median and the whole curve from one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.linear import linear as linear_model
from support.linear import linear_batch
from torch import Tensor, nn

from advvl import L2, Adapter, Ball, Linf
from advvl.errors import ConfigurationError, SiteError
from advvl.evaluation.curves import Curve
from advvl.evaluation.minimum_norms import MinimumNorms, minimum_norms
from advvl.evaluation.rows import take_rows
from advvl.maximizers.minimum_norm import MinimumNorm

CLOSE = 0.01


def labels(batch: Any) -> Tensor:
    found: Tensor = batch["labels"]
    return found


def linear(rows: int = 24) -> tuple[Adapter, dict[str, Any]]:
    """A linear model, and a batch in which every eighth label is wrong."""
    target, batch = linear_model(), linear_batch(rows)
    target.model.eval()
    batch["labels"][::8] = 1 - batch["labels"][::8]
    return target, batch


def distances(target: Adapter, batch: dict[str, Any], budget: dict[str, Ball]) -> Tensor:
    """The distance of each row to the boundary in closed form; with several modalities in shares of their radii."""
    with torch.no_grad():
        logits = target.model(**batch)
    gap = (logits[:, 0] - logits[:, 1]).abs()
    per_unit = torch.zeros_like(gap)
    for name, normal in target.model.normals(batch).items():
        if name in budget:
            ball = budget[name]
            unit = ball.radius if len(budget) > 1 else 1.0  # type: ignore[attr-defined]
            flat = normal.flatten(1)
            per_unit += unit * (flat.norm(dim=1) if isinstance(ball, L2) else flat.abs().sum(1))
    return torch.where(logits.argmax(1) == batch["labels"], gap / per_unit, 0.0)


BUDGETS: dict[str, dict[str, Ball]] = {
    "L2": {"image": L2(9.0)},
    "Linf": {"text": Linf(9.0)},
    "jointly": {"text": L2(9.0), "image": Linf(2.0)},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_norms_of_a_linear_model_are_its_distances_to_the_boundary(budget: dict[str, Ball]) -> None:
    target, batch = linear()
    found = minimum_norms(target, [batch], budget, targets=labels, steps=60)
    exact = distances(target, batch, budget)
    assert (found.norms[::8] == 0).all()
    assert found.norms.isfinite().all()
    assert (found.norms >= exact * (1 - 1e-12)).all()
    assert (found.norms <= exact * (1 + CLOSE)).all()
    assert found.clean.tolist() == (exact > 0).double().tolist()
    assert found.flags == ()


def test_beyond_the_radius_nothing_is_found_and_its_norm_is_infinite() -> None:
    target, batch = linear()
    far = distances(target, batch, {"image": L2(9.0)})
    radius = 0.7
    found = minimum_norms(target, [batch], {"image": L2(radius)}, targets=labels, steps=60, checks=False)
    assert torch.equal(found.norms.isinf(), far > radius)
    assert found.norms.isinf().any()
    assert found.norms[found.norms.isfinite()].max() <= radius * (1 + 1e-10)


def test_the_curve_of_one_run_is_the_accuracy_at_every_radius() -> None:
    target, batch = linear()
    exact = distances(target, batch, {"image": L2(9.0)})
    found = minimum_norms(target, [batch], {"image": L2(9.0)}, targets=labels, steps=60, checks=False)
    radii = [0.1, 0.5, 1.0, 4.0]
    curve = found.curve(radii)
    assert isinstance(curve, Curve)
    assert curve.scores.tolist() == [(exact > radius).double().tolist() for radius in radii]
    whole = found.curve()
    assert list(whole.radii) == [*sorted(set(found.norms[found.norms > 0].tolist())), 9.0]
    right = int((exact > 0).sum())
    assert whole.scores.sum(dim=1).tolist() == [*range(right - 1, -1, -1), 0]
    assert "image (L2), 24 examples" in str(curve)
    assert len(curve.intervals()) == 5


def test_a_curve_of_many_examples_has_100_norms_at_most() -> None:
    norms = torch.rand(1000, dtype=torch.float64)
    whole = MinimumNorms("image (L2)", 2.0, torch.ones(1000, dtype=torch.float64), norms).curve()
    assert len(whole.radii) == 101
    assert whole.radii[0] == norms.min()
    assert whole.radii[-2:] == (norms.max().item(), 2.0)
    assert whole.scores[-1].sum() == 0


def test_scores_between_0_and_1_are_kept_below_the_norm() -> None:
    clean = torch.tensor([0.6, 0.0, 0.3, 1.0], dtype=torch.float64)
    norms = torch.tensor([0.5, 0.0, math.inf, 0.2], dtype=torch.float64)
    found = MinimumNorms("text (L2)", 1.0, clean, norms)
    assert found.curve([0.1, 0.2, 0.5]).scores.tolist() == [[0.6, 0, 0.3, 1], [0.6, 0, 0.3, 0], [0, 0, 0.3, 0]]


def test_the_median_has_an_interval_and_may_be_infinite() -> None:
    norms = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, *[math.inf] * 5], dtype=torch.float64)
    found = MinimumNorms("text (L2)", 1.0, torch.ones(11, dtype=torch.float64), norms)
    middle = found.median()
    assert (middle.estimate, middle.low, middle.high, middle.count) == (0.5, 0.1, math.inf, 11)
    assert repr(found) == "text (L2), 11 examples: median 0.5 [0.1, inf]"


def test_a_norm_is_that_of_a_perturbation_that_a_fresh_forward_confirms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose claims are halved: what does not flip the example is not its norm."""
    target, batch = linear()
    budget: dict[str, Ball] = {"image": L2(9.0)}
    honest = minimum_norms(target, [batch], budget, targets=labels, steps=30, checks=False)
    probes = MinimumNorm.probes

    def claims(self: MinimumNorm, *given: Any, **options: Any) -> Any:
        ended = yield from probes(self, *given, **options)
        return {name: delta / 2 for name, delta in ended.items()}

    monkeypatch.setattr(MinimumNorm, "probes", claims)
    found = minimum_norms(target, [batch], budget, targets=labels, steps=30, checks=False)
    assert (found.norms >= honest.norms).all()
    assert (found.norms >= distances(target, batch, budget) * (1 - 1e-12)).all()


def test_batches_and_rows_change_nothing_and_the_seed_gives_the_same_bits() -> None:
    target, batch = linear()
    parts = [take_rows(batch, torch.arange(10)), take_rows(batch, torch.arange(10, 24))]
    options: dict[str, Any] = {"targets": labels, "steps": 20, "checks": False}
    whole, again = (minimum_norms(target, [batch], {"image": L2(9.0)}, **options).norms for _ in range(2))
    assert torch.equal(whole, again)
    split = minimum_norms(target, parts, {"image": L2(9.0)}, rows=take_rows, **options).norms
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=0)


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


def test_flags_of_the_search_come_with_the_norms() -> None:
    """No gradient goes through a rounding: that no perturbation is found says nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), Rounds(), nn.Linear(4, 3)).double().eval()
    batch = {"x": 2 * torch.randn(12, 4).double()}
    batch["targets"] = model(batch["x"]).argmax(1)
    target = Adapter(model, {"image": "0"}, call=lambda net, batch: net(batch["x"]))
    found = minimum_norms(target, [batch], {"image": L2(1.0)}, steps=5)
    assert found.norms.isinf().all()
    assert "vanishing gradients" in {flag.name for flag in found.flags}
    assert "flag: vanishing gradients. minimum norm found no gradient of 'image' on 12 of 12" in repr(found)


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "a list": (lambda t, b: minimum_norms(t, [b], [{"image": L2(1.0)}]), ConfigurationError, "expected one budget"),  # type: ignore[arg-type]
    "no radius": (lambda t, b: minimum_norms(t, [b], {"image": L2()}), ConfigurationError, "a finite radius above 0"),
    "steps": (lambda t, b: minimum_norms(t, [b], {"image": L2(1.0)}, steps=0), ConfigurationError, "steps"),
    "modality": (lambda t, b: minimum_norms(t, [b], {"imge": L2(1.0)}), SiteError, "'imge'"),
}


@pytest.mark.parametrize(("run", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_budgets_that_are_none_are_refused(run: Callable[[Any, Any], Any], error: type[Exception], words: str) -> None:
    target, batch = linear()
    with pytest.raises(error, match=words):
        run(target, batch)


@pytest.mark.parametrize("radii", [[], [0.0, 1.0], [0.5, 0.2], [0.5, 3.0], [math.inf]], ids=str)
def test_radii_that_the_search_did_not_cover_are_refused(radii: list[float]) -> None:
    found = MinimumNorms("text (L2)", 1.0, torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match=r"radii above 0, each larger than the one before, up to 1, got"):
        found.curve(radii)
