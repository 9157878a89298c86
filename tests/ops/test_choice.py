"""Which back end does the work, and what none of them is given to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from advvl import L2, Ascent, EmbeddingPerturber, Place, ops
from advvl.errors import ConfigurationError, ShapeError
from advvl.ops import Stepped
from advvl.perturbers.ascents import AscentStep, StepMemory


def stepped(delta: Tensor, **options: Any) -> Stepped:
    return ops.step_and_project(delta, torch.ones_like(delta), step_size=0.1, radius=1.0, **options)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize(("name", "wrong"), [("norm", "L2"), ("rule", "Sign"), ("per", "batch")])
def test_a_name_that_is_none_is_refused(name: str, wrong: str, backend: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"expected {name} to be one of .*, got '{wrong}'"):
        stepped(torch.zeros(2, 3), backend=backend, **{name: wrong})


def test_a_back_end_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a back end among .*'triton'.*, got 'cuda'"):
        stepped(torch.zeros(2, 3), backend="cuda")


def test_a_back_end_that_cannot_says_why_and_who_can() -> None:
    packed = {"segments": torch.tensor([0, 0, 1])}
    with pytest.raises(ConfigurationError, match=r"got 'cpu': .*packed.*; available: \['reference'.*\]"):
        stepped(torch.zeros(3, 2), backend="cpu", **packed)
    assert stepped(torch.zeros(3, 2), **packed).delta.any()


@pytest.mark.parametrize(
    "overlapping",
    [torch.zeros(1, 3).expand(2, 3), torch.zeros(12).unfold(0, 4, 2), torch.zeros(3, 1, 2).expand(3, 4, 2)],
    ids=["expanded", "windows", "expanded-inside"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_shares_memory_with_itself_is_not_changed_in_place(overlapping: Tensor, backend: Any) -> None:
    with pytest.raises(ShapeError, match="expected a perturbation that owns each of its entries"):
        stepped(overlapping, inplace=True, backend=backend)
    apart = stepped(overlapping.clone(), backend=backend).delta
    torch.testing.assert_close(stepped(overlapping, backend=backend).delta, apart)


@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: x.transpose(1, 2), lambda x: x[::2], lambda x: x[:, :0]])
def test_other_layouts_are_changed_in_place_where_they_lie(arrange: Any) -> None:
    whole = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    part = arrange(whole)
    expected = stepped(part.clone()).delta
    assert stepped(part, inplace=True).delta is part
    torch.testing.assert_close(part, expected)


def test_several_perturbations_in_one_call_are_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    moves = [
        ops.Move(
            delta=torch.randn(2, 3, size, generator=generator),
            grad=torch.randn(2, 3, size, generator=generator),
            step_size=0.1 * size,
            rows=ops.Rows(norm=norm, per=per),
            region=ops.Region(radius=0.7),
        )
        for size, norm, per in [(2, "l2", "sample"), (5, "linf", "token"), (7, "l2", "token")]
    ]
    for one, made in zip(moves, ops.move(moves), strict=True):
        alone = ops.move([one])[0]
        for ours, theirs in zip(made, alone, strict=True):
            assert torch.equal(ours, theirs)
    assert ops.move([]) == []


class Still(Ascent):
    def step(self, delta: Tensor, grad: Tensor, place: Place, memory: StepMemory = StepMemory()) -> AscentStep:  # noqa: B008
        return super().step(delta, torch.zeros_like(grad), place, memory)


class Loose(L2):
    def step(self, delta: Tensor, grad: Tensor, place: Place, **options: Any) -> Stepped:
        return super().step(delta, torch.zeros_like(grad), place, **options)


@pytest.mark.parametrize("ascent", [Still(L2(), step_size=0.5), Ascent(Loose(), step_size=0.5)], ids=["ascent", "ball"])
def test_a_step_of_ones_own_is_taken(ascent: Ascent) -> None:
    delta, place = torch.ones(2, 3), Place(torch.zeros(2, 3))
    moved = EmbeddingPerturber(text=ascent).move({"text": delta}, {"text": torch.ones(2, 3)}, {"text": place}, {})
    assert torch.equal(moved.deltas["text"], delta)
