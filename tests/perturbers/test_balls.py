"""Balls are values that say what a norm is taken over, how far a random start reaches, and which way is steepest."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.draws import randn

from advvl import L2, Ball, Linf, Place
from advvl.errors import ConfigurationError


def test_balls_are_frozen_values() -> None:
    assert L2(1.0) == L2(1.0)
    assert L2(1.0) != L2(1.0, per="token")
    assert L2(1.0) != Linf(1.0)
    assert L2().radius == Linf().radius == math.inf
    with pytest.raises(dataclasses.FrozenInstanceError):
        L2(1.0).radius = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("ball", [L2, Linf], ids=["L2", "Linf"])
@pytest.mark.parametrize("radius", [-1.0, -1e-30, -math.inf, math.nan], ids=str)
def test_a_radius_below_zero_is_refused(ball: type[Ball], radius: float) -> None:
    with pytest.raises(ConfigurationError, match=f"expected a radius of 0 or more .*, got {radius}"):
        ball(radius)


@pytest.mark.parametrize("ball", [L2, Linf], ids=["L2", "Linf"])
def test_an_unknown_granularity_is_refused(ball: type[Ball]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected per to be one of \('sample', 'token'\), got 'batch'"):
        ball(1.0, per="batch")


@pytest.mark.parametrize(
    ("ball", "expected"),
    [
        (L2(), [5.0, 13.0]),
        (Linf(), [4.0, 12.0]),
        (L2(per="token"), [[3.0, 4.0], [13.0, 0.0]]),
        (Linf(per="token"), [[3.0, 4.0], [12.0, 0.0]]),
    ],
    ids=repr,
)
def test_a_norm_is_taken_over_what_the_ball_says(ball: Ball, expected: list) -> None:
    delta = torch.tensor([[[3.0, 0.0], [0.0, -4.0]], [[5.0, -12.0], [0.0, 0.0]]])
    assert ball.norms(delta, Place(delta)).tolist() == expected


@pytest.mark.parametrize("ball", [L2(0.5), Linf(0.5), L2(0.5, per="token"), Linf(0.5, per="token")], ids=repr)
def test_a_step_of_a_balls_own_norm_has_the_length_of_its_step_size(ball: Ball) -> None:
    x = torch.zeros(3, 4, 5, dtype=torch.float64)
    stepped = ball.step(x, randn(3, 4, 5), Place(x), step_size=0.25)
    torch.testing.assert_close(stepped.delta_norm, torch.full_like(stepped.delta_norm, 0.25), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(ball.norms(stepped.delta, Place(x)), stepped.delta_norm, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("ball", [L2(0.5), Linf(0.5), L2(0.5, per="token"), Linf(0.5, per="token")], ids=repr)
def test_a_long_step_ends_on_the_surface(ball: Ball) -> None:
    x = torch.zeros(3, 4, 5, dtype=torch.float64)
    stepped = ball.step(x, randn(3, 4, 5), Place(x), step_size=7.0)
    torch.testing.assert_close(stepped.delta_norm, torch.full_like(stepped.delta_norm, 0.5), rtol=1e-12, atol=0.0)
    assert torch.equal(ball.project(stepped.delta, Place(x)), stepped.delta)


@pytest.mark.parametrize("ball", [L2(0.5), Linf(0.5)], ids=repr)
def test_steps_and_projections_see_mask_segments_and_box(ball: Ball) -> None:
    x = torch.rand(4, 5, dtype=torch.float64)
    place = Place(x, mask=torch.tensor([True, False, True, True]), segments=torch.tensor([0, 0, 1, 1]))
    delta, grad = randn(4, 5), randn(4, 5, seed=1)
    stepped = ball.step(delta, grad, place, step_size=0.1, box=(0.0, 1.0))
    projected = ball.project(delta, place, box=(0.0, 1.0))
    for moved in (stepped.delta, projected):
        assert not moved[1].any()
        assert ((x + moved >= 0) & (x + moved <= 1)).all()
        assert (ball.norms(moved, place)[:2] <= 0.5).all()
        assert not ball.norms(moved, place)[2:].any()


def test_an_l2_start_spreads_over_the_real_positions_of_each_sample() -> None:
    x = torch.zeros(3, 4, 5, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 1, 0])[:, None]
    spread = L2().spread(0.3, Place(x, mask))
    assert spread.shape == (3, 1, 1)
    torch.testing.assert_close(
        spread.flatten(), 0.3 / torch.tensor([20.0, 5.0, 1.0], dtype=torch.float64).sqrt(), rtol=1e-12, atol=0.0
    )
    torch.testing.assert_close(
        L2().spread(0.3, Place(x)).flatten(), torch.full((3,), 0.3 / math.sqrt(20), dtype=torch.float64)
    )


def test_an_l2_start_of_packed_rows_spreads_over_each_segment() -> None:
    x = torch.zeros(5, 7, dtype=torch.float64)
    spread = L2().spread(1.0, Place(x, segments=torch.tensor([0, 0, 0, 2, 2])))
    expected = 1 / torch.tensor([21.0, 21, 21, 14, 14], dtype=torch.float64).sqrt()
    torch.testing.assert_close(spread, expected[:, None], rtol=1e-12, atol=0.0)


def test_an_l2_start_per_token_spreads_over_one_position() -> None:
    assert L2(per="token").spread(1.0, Place(torch.zeros(2, 3, 25))) == pytest.approx(0.2, rel=1e-12)


def test_an_linf_start_spreads_by_its_magnitude() -> None:
    assert Linf(1.0).spread(0.3, Place(torch.zeros(2, 3, 5))) == 0.3
