"""Descriptions: equal for equal values, wherever they are; different for different ones, however large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import advvl
from advvl import L2, PGD, Ascent, EmbeddingPerturber, FreeLB
from advvl.runtime.descriptions import described, differing


class Plain:
    """Has the `repr` that every object has, with its address."""

    def __init__(self, size: float) -> None:
        self.size = size

    def scale(self, x: float) -> float:
        return self.size * x


@dataclass(frozen=True)
class Hidden:
    size: float = field(repr=False)


class Colour(Enum):
    RED = 1
    BLUE = 2


def double(x: float) -> float:
    return 2 * x


def method(start: float) -> advvl.AdversarialTraining:
    values = torch.zeros(2, 5000)
    values[1, 2500] = start  # where a repr of a tensor shows nothing
    ascent = advvl.Ascent(advvl.L2(), step_size=0.1, start=advvl.Given(values))
    return replace(advvl.villa(), perturber=advvl.EmbeddingPerturber(text=ascent))


SAME_BUT_FOR_A_NUMBER: dict[str, Callable[[Any], Any]] = {
    "number": float,
    "text": str,
    "object": Plain,
    "method of one": lambda number: Plain(number).scale,
    "hidden field": Hidden,
    "in a list": lambda number: [1, (Plain(number),)],
    "in a mapping": lambda number: {"a": {"b": Plain(number)}},
    "in a set": lambda number: {"x", "y", number},
    "partial": lambda number: partial(double, Plain(number)),
    "tensor": lambda number: torch.full((3,), number),
    "transposed": lambda number: torch.tensor([[1.0, 2.0], [3.0, number]]).T,
    "half": lambda number: torch.full((3,), number, dtype=torch.bfloat16),
    "empty": lambda number: torch.zeros(0, int(number)),
    "given start": method,
    "recipe": lambda number: advvl.villa(step_sizes={"text": number}),
    "module": lambda number: nn.Linear(int(number), 3),
}


@pytest.mark.parametrize("make", SAME_BUT_FOR_A_NUMBER.values(), ids=SAME_BUT_FOR_A_NUMBER)
def test_equal_values_are_described_alike_and_others_are_not(make: Callable[[Any], Any]) -> None:
    kept = make(2.0), make(2.0)
    assert described(kept[0]) == described(kept[1])
    assert described(kept[0]) != described(make(3.0))
    assert " at 0x" not in described(kept[0])


def test_the_order_of_a_mapping_and_of_a_sequence_counts_and_that_of_a_set_does_not() -> None:
    assert described({"a": 1, "b": 2}) != described({"b": 2, "a": 1})
    assert described([1, 2]) != described([2, 1]) != described((2, 1))
    assert described({"a", "b"}) == described({"b", "a"})


def test_functions_and_members_go_by_their_names_and_devices_by_their_kind() -> None:
    assert described(double) == f"{__name__}.double"
    assert described(torch.sum) != described(torch.mean)
    assert described(Plain) == f"{__name__}.Plain"
    assert described(Colour.RED) != described(Colour.BLUE)
    assert described(torch.device("cuda", 0)) == described(torch.device("cuda", 1)) != described(torch.device("cpu"))
    assert described(torch.zeros(2)) != described(torch.zeros(2).double()) != described(torch.zeros(1, 2).double())


def test_what_holds_itself_is_described_too() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert described(ring) == "[1, …]"
    assert described([(1,), (1,)]) == "[(1), (1)]"


def test_only_the_fields_that_differ_are_named() -> None:
    def method(step_size: float, maximizer: Any, note: str = "a, (b") -> str:
        ascent = Ascent(L2(), step_size=step_size)
        return described({"note": note, "perturber": EmbeddingPerturber(text=ascent, image=ascent), "max": maximizer})

    here = method(0.1, FreeLB(3))
    assert differing(here, here) == "nothing"
    step = "step_size (0.2 there, 0.1 here)"
    assert differing(method(0.2, FreeLB(3)), here) == (f"perturber.ascents.text.{step}, perturber.ascents.image.{step}")
    assert differing(method(0.1, FreeLB(4)), here) == "max.steps (4 there, 3 here)"
    other = differing(method(0.1, PGD(2)), here)
    assert other.startswith("max (PGD(steps=2, ")
    assert other.endswith(" here)")
    assert differing(method(0.1, FreeLB(3), "it's, ["), here) == "note (\"it's, [\" there, 'a, (b' here)"
    assert differing("None", here) == f"(None there, {here[:60]}… here)"
    assert differing(described([1, (2, 3)]), described([1, (2, 4)])) == "1.1 (3 there, 4 here)"
