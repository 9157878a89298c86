"""Draws of each row by itself: alike whatever is beside it, and as good as random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advvl.data.row_draws import RowDraws


def draws(indices: list[int], seed: int = 0) -> RowDraws:
    return RowDraws.of(indices, torch.Generator().manual_seed(seed))


@pytest.mark.slow
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), st.integers(0, 2**32), st.integers(0, 40), st.data())
def test_a_rows_draws_depend_on_no_other_row_and_on_no_padding(
    indices: list[int], seed: int, width: int, data: st.DataObject
) -> None:
    kept = data.draw(st.lists(st.sampled_from(range(len(indices))), min_size=1, max_size=5))
    narrow = data.draw(st.integers(0, width))
    whole = draws(indices, seed).uniform("words", width)
    part = draws([indices[row] for row in kept], seed).uniform("words", narrow)
    assert whole.shape == (len(indices), width)
    assert whole.dtype == torch.float64
    assert torch.equal(part, whole[kept, :narrow])


def test_draws_are_of_their_seed_example_and_purpose() -> None:
    one = draws([3, 4]).uniform("words", 8)
    assert torch.equal(one, draws([3, 4]).uniform("words", 8))
    others = [
        draws([3, 4], seed=1).uniform("words", 8),
        draws([3, 4]).uniform("fate", 8),
        draws([5, 6]).uniform("words", 8),
    ]
    for other in (*others, one.roll(1, 0), one.roll(1, 1)):
        assert not bool((one == other).any())


def test_the_generator_moves_by_one_draw_however_many_rows() -> None:
    one, many = (torch.Generator().manual_seed(0) for _ in range(2))
    RowDraws.of([7], one)
    RowDraws.of(list(range(50)), many)
    assert torch.equal(one.get_state(), many.get_state())
    assert not torch.equal(one.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_draws_are_uniform_and_neighbours_are_not_alike(seed: int) -> None:
    """512 counting examples by 512 places: of 2**18 numbers, means and correlations within five of their deviations."""
    u = draws(list(range(512)), seed).uniform("words", 512)
    assert bool(((u >= 0) & (u < 1)).all())
    counts = torch.bincount((u * 64).long().flatten(), minlength=64).double()
    expected = u.numel() / 64
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 63) < 5 * (2 * 63) ** 0.5
    z = (u - 0.5) * 12**0.5
    again = (draws(list(range(512)), seed).uniform("fate", 512) - 0.5) * 12**0.5
    next_seed = (draws(list(range(512)), seed + 1).uniform("words", 512) - 0.5) * 12**0.5
    for name, other in {
        "the place after": z.roll(1, 1),
        "the example after": z.roll(1, 0),
        "both": z.roll((1, 1), (0, 1)),
        "another purpose": again,
        "the next seed": next_seed,
    }.items():
        assert abs(float((z * other).mean())) < 5 / 512, name
    assert z.mean(0).abs().max() < 5 / 512**0.5
    assert z.mean(1).abs().max() < 5 / 512**0.5
