"""Radius, step size and start in units of the embedding's mean norm, of a sample or of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from advvl import L2, Ascent, Ball, Linf, Normal, Place, Start, Uniform
from advvl.errors import ConfigurationError
from advvl.perturbers import Adam

KINDS = [L2, Linf]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
each_per = pytest.mark.parametrize("per", ["sample", "token"])
each_over = pytest.mark.parametrize("over", [True, "row", "batch"], ids=str)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
X = randn(3, 4, 5) * torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64)[:, None, None]
X[~MASK] = math.nan
PLACE = Place(X, MASK)


def units(over: bool | str) -> list[float]:
    """The mean norm of the real positions of each sample, or of all, by hand."""
    norms = [[X[b, t].norm().item() for t in range(4) if MASK[b, t]] for b in range(3)]
    every = [norm for row in norms for norm in row]
    return [sum(every) / len(every)] * 3 if over == "batch" else [sum(row) / len(row) for row in norms]


@each_kind
@each_per
@each_over
@pytest.mark.parametrize("radius", [0.05, math.inf])
def test_a_row_moves_as_under_the_numbers_times_its_unit(kind: type, per: str, over: bool | str, radius: float) -> None:
    delta, grad = 0.1 * randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    ascent = Ascent(kind(radius, per, relative=over), step_size=0.03)
    moved = ascent.step(ascent.ball.project(delta, PLACE), grad, PLACE).delta
    for row, unit in enumerate(units(over)):
        plain = Ascent(kind(radius * unit, per), step_size=0.03 * unit)
        alone = plain.step(plain.ball.project(delta, PLACE), grad, PLACE).delta
        torch.testing.assert_close(moved[row], alone[row], rtol=1e-12, atol=1e-15)


@each_kind
@each_per
@each_over
@pytest.mark.parametrize("start", [Uniform(0.02), Normal(0.01)], ids=repr)
def test_a_start_is_in_the_same_unit(kind: type, per: str, over: bool | str, start: Start) -> None:
    def begun(ball: Ball) -> Tensor:
        return Ascent(ball, step_size=0.1).begin(start, PLACE, torch.Generator().manual_seed(3))

    relative, plain = begun(kind(per=per, relative=over)), begun(kind(per=per))
    assert relative.dtype == plain.dtype
    for row, unit in enumerate(units(over)):
        torch.testing.assert_close(relative[row], plain[row] * unit, rtol=1e-12, atol=0.0)
    bf16 = Ascent(kind(per=per, relative=over), step_size=0.1).begin(start, Place(X.bfloat16(), MASK), None)
    assert bf16.dtype == torch.float32


@pytest.mark.slow
@each_kind
@each_per
@each_over
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_row_ends_inside_the_ball_of_its_unit_in_its_storage_dtype(
    kind: type, per: str, over: bool | str, dtype: torch.dtype
) -> None:
    for seed in range(20):
        x = randn(7, 3, 31, seed=seed, dtype=dtype)
        place = Place(x, torch.rand(7, 3, generator=torch.Generator().manual_seed(seed)) > 0.2)
        sizes = x.double().norm(dim=-1).masked_fill(~place.mask, 0.0)
        unit = sizes.sum(1) / place.mask.sum(1).clamp(min=1)
        if over == "batch":
            unit = (sizes.sum() / place.mask.sum()).expand(7)
        ascent = Ascent(kind(0.05, per, relative=over), step_size=0.06)
        delta = ascent.step(torch.zeros_like(x), randn(7, 3, 31, seed=seed + 99), place).delta
        wide = delta.double() if per == "token" else delta.double().flatten(1)
        norms = wide.norm(dim=-1) if kind is L2 else wide.abs().amax(-1)
        bound = 0.05 * (unit if per == "sample" else unit[:, None])
        assert (norms <= bound * (1 + 1e-15)).all()  # the bound's own rounding
        assert (norms >= bound * (1 - 1e-5))[place.mask if per == "token" else place.mask.any(1)].all()
        assert torch.equal(ascent.ball.project(delta, place), delta)


@each_kind
@each_per
def test_the_unit_of_a_row_depends_neither_on_padding_nor_on_the_other_samples(kind: type, per: str) -> None:
    ascent, grad = Ascent(kind(0.05, per, relative=True), step_size=0.03), randn(3, 4, 5, seed=2)
    whole = ascent.step(torch.zeros_like(X), grad, PLACE).delta
    for row in range(3):
        x, mask = (torch.cat([t[row : row + 1], t.new_zeros(1, 2, *t.shape[2:])], 1) for t in (X, MASK))
        longer = torch.cat([grad[row : row + 1], torch.ones(1, 2, 5, dtype=torch.float64)], 1)
        alone = ascent.step(torch.zeros_like(x), longer, Place(x, mask)).delta
        torch.testing.assert_close(alone[0, :4], whole[row], rtol=1e-12, atol=0.0)


@each_kind
@each_per
@each_over
def test_packed_rows_have_the_unit_of_their_sample(kind: type, per: str, over: bool | str) -> None:
    """The real positions of every sample, one after the other."""
    owners = torch.arange(3)[:, None].expand(3, 4)[MASK]
    grad = randn(3, 4, 5, seed=2)
    for start in (Uniform(0.0), Uniform(0.02)):
        ascent = Ascent(kind(0.05, per, relative=over), step_size=0.03, rule="sign", start=start)
        padded = ascent.step(torch.zeros_like(X), grad, PLACE).delta[MASK]
        packed = ascent.step(torch.zeros(len(owners), 5).double(), grad[MASK], Place(X[MASK], segments=owners)).delta
        torch.testing.assert_close(packed, padded, rtol=1e-12, atol=0.0)
    widths = [ascent.ball.spread(0.02, place) for place in (PLACE, Place(X[MASK], segments=owners))]
    spread = [width.expand(*shape, 5) for width, shape in zip(widths, ((3, 4), (len(owners),)), strict=True)]
    torch.testing.assert_close(spread[1], spread[0][MASK], rtol=1e-12, atol=0.0)


@each_kind
@each_per
@each_over
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 5), (2, 3, 4, 5)], ids=str)
def test_tensors_of_any_shape_have_a_unit(kind: type, per: str, over: bool | str, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    ascent = Ascent(kind(0.05, per, relative=over), step_size=0.03, start=Uniform(0.1))
    delta = ascent.begin(ascent.start, Place(x), None)
    moved = ascent.step(delta, randn(*shape, seed=1), Place(x)).delta
    assert moved.shape == shape
    assert moved.isfinite().all()


def test_a_sample_without_real_positions_stays_where_it_is() -> None:
    place = Place(torch.ones(2, 3, 5), torch.tensor([[True] * 3, [False] * 3]))
    delta = Ascent(L2(0.5, relative=True), step_size=0.1).step(torch.zeros(2, 3, 5), torch.ones(2, 3, 5), place).delta
    assert delta[0].any()
    assert not delta[1].any()


def test_adams_step_is_in_the_unit_too() -> None:
    ascent = Ascent(L2(per="token", relative=True), step_size=0.03, rule=Adam())
    delta = ascent.step(torch.zeros_like(X), randn(3, 4, 5, seed=2), PLACE).delta
    for row, unit in enumerate(units("row")):
        expected = torch.full((5,), 0.03 * unit, dtype=torch.float64)
        torch.testing.assert_close(delta[row, 0].abs(), expected, rtol=1e-6, atol=0.0)


def test_another_unit_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected relative to be a bool or one of \('row', 'batch'\), got 'token'"
    ):
        L2(0.1, relative="token")
    with pytest.raises(ConfigurationError, match=r"expected relative to be a bool or one of .*, got None"):
        Linf(0.1, relative=None)
