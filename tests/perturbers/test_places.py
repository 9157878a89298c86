"""Packed tensors: several samples in a row are stepped as if each were a padded row of its own, whatever their numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from advvl import L2, Adam, Ascent, Linf, Momentum, Normal, Place, Uniform
from advvl.perturbers.balls import Ball

LENGTHS = [[4, 2], [1, 5]]  # of the samples in either row
NUMBERS = [[7, 0], [3, 12]]  # of these samples: in no order, with gaps, above the number of rows
WIDTH = 5


def packed() -> Place:
    torch.manual_seed(0)
    segments = torch.tensor(
        [
            [number for number, length in zip(*row, strict=True) for _ in range(length)]
            for row in zip(NUMBERS, LENGTHS, strict=True)
        ]
    )
    mask = torch.ones_like(segments, dtype=torch.bool)
    mask[1, 5] = False
    return Place(torch.rand(*segments.shape, WIDTH, dtype=torch.float64), mask, segments)


def padded(values: Tensor) -> Tensor:
    """The samples as rows, filled up with zeros."""
    cut = [part for row, lengths in zip(values, LENGTHS, strict=True) for part in row.split(lengths)]
    return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True)


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(padded(found), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "ball", [L2(0.3), L2(0.2, "token"), Linf(0.1), L2(0.3, relative=True), L2(0.3, relative="batch")]
)
@pytest.mark.parametrize("rule", ["normalised", "sign", Momentum(0.5), Adam()], ids=str)
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_samples_in_a_row_move_as_padded_rows_do(ball: Ball, rule: Any, box: Any) -> None:
    ours = packed()
    theirs = Place(padded(ours.x), padded(ours.mask))
    ascent = Ascent(ball, step_size=0.2, rule=rule, box=box)
    deltas, memories = [torch.zeros_like(ours.x), torch.zeros_like(theirs.x)], [{}, {}]
    for _ in range(3):
        grad = torch.randn_like(ours.x)
        steps = [
            ascent.step(delta, g, place, *memory)
            for delta, g, place, memory in zip(
                deltas, (grad, padded(grad)), (ours, theirs), [m.values() for m in memories], strict=True
            )
        ]
        deltas, memories = [step.delta for step in steps], [{"memory": step.memory} for step in steps]
        agree(deltas[0], deltas[1])
    numbers = [number for row in NUMBERS for number in row]
    norms, expected = ball.norms(deltas[0], ours), ball.norms(deltas[1], theirs)
    if ball.per == "token":
        agree(norms, expected)
    else:
        torch.testing.assert_close(norms[numbers], expected, rtol=1e-12, atol=0)
        assert norms.count_nonzero() == len(numbers)


@pytest.mark.parametrize("start", [Uniform(0.4), Normal(0.1)])
@pytest.mark.parametrize("ball", [L2(), L2(relative=True), Linf(per="token", relative=True)])
def test_starts_are_as_wide_as_those_of_padded_rows(start: Any, ball: Ball) -> None:
    place = packed()
    torch.testing.assert_close(
        padded(torch.as_tensor(ball.spread(1.0, place)).expand(place.x.shape).contiguous())
        * padded(place.mask)[..., None],
        torch.as_tensor(ball.spread(1.0, Place(padded(place.x), padded(place.mask)))).expand(4, 5, WIDTH)
        * padded(place.mask)[..., None],
        rtol=1e-12,
        atol=0,
    )
    assert not Ascent(ball, step_size=0.1, start=start).begin(start, place, None)[~place.mask].any()


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])])
def test_a_mask_of_rows_is_one_of_all_their_positions(mask: Any) -> None:
    place = Place(torch.ones(2, 6, WIDTH), mask, torch.tensor([[0] * 6, [1] * 6]))
    moved = Ascent(L2(), step_size=1.0).step(torch.zeros(2, 6, WIDTH), torch.ones(2, 6, WIDTH), place).delta
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.tensor([1.0, 1.0 if mask is None else 0.0]))


def test_rows_of_numbers_above_their_count_have_their_norms_there() -> None:
    place = Place(torch.zeros(2, 3), segments=torch.tensor([4, 1]))
    found = Ascent(L2(), step_size=1.0).step(torch.zeros(2, 3), torch.ones(2, 3), place).delta
    torch.testing.assert_close(L2().norms(found, place), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]))


def test_a_place_without_rows_has_none() -> None:
    place = Place(torch.zeros(0, 3), segments=torch.zeros(0, dtype=torch.long))
    assert L2().norms(torch.zeros(0, 3), place).tolist() == []
