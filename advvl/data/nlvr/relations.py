"""Relations of an object to the others: walls that it touches, objects on and under it, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from advvl.data.nlvr.statements import COLORS, SHAPES, SIDE, Item

GAP: Final = 3
"""Pixels within which things touch; the blocks of a tower are 1 apart."""

_LEVELS, _IN_BOX, _OF_KIND = 4, 8, 3

RELATIONS: Final = (
    4 + 2 * (len(COLORS) + 1) + 2 + _LEVELS + _IN_BOX + _OF_KIND * (len(COLORS) + len(SHAPES)) + 3 * _IN_BOX
)
"""Numbers that `relations` gives of each object."""


def relations(boxes: Sequence[Sequence[Item]]) -> list[list[list[float]]]:
    """Return `RELATIONS` numbers of 0 or 1 for each object of each box.

    They say which of four walls it touches; the colour of the object that touches it from above and from below, if any;
    whether it touches a wall, and anything; how many objects lie below it; how many its box has, and of each colour and
    shape; how many in all boxes are of its colour, its shape, and both. Numbers are in steps: 1 or more, 2 or more, and
    on.
    """
    everything = [item for box in boxes for item in box]
    return [[_of(item, box, everything) for item in box] for box in boxes]


def _of(item: Item, box: Sequence[Item], everything: Sequence[Item]) -> list[float]:
    others = [one for one in box if one is not item]
    above = next((one for one in others if _lies_on(one, item)), None)
    below = next((one for one in others if _lies_on(item, one)), None)
    walls = [
        item.x <= GAP - 1,
        item.x + item.size >= SIDE - GAP + 1,
        item.y <= GAP - 1,
        item.y + item.size >= SIDE - GAP + 1,
    ]
    under = sum(one.y > item.y for one in others)
    found = [
        *walls,
        *_colour(above),
        *_colour(below),
        any(walls),
        any(_touch(item, one) for one in others),
        *_steps(under, _LEVELS),
        *_steps(len(box), _IN_BOX),
    ]
    for kind, names in (("color", COLORS), ("shape", SHAPES)):
        for name in names:
            found += _steps(sum(getattr(one, kind) == name for one in box), _OF_KIND)
    same_color = [one for one in everything if one.color == item.color]
    found += _steps(len(same_color), _IN_BOX)
    found += _steps(sum(one.shape == item.shape for one in everything), _IN_BOX)
    found += _steps(sum(one.shape == item.shape for one in same_color), _IN_BOX)
    return [float(one) for one in found]


def _steps(count: int, most: int) -> list[bool]:
    return [count > step for step in range(most)]


def _colour(item: Item | None) -> list[bool]:
    return [item is None, *(item is not None and item.color == color for color in COLORS)]


def _lies_on(upper: Item, lower: Item) -> bool:
    beside = upper.x < lower.x + lower.size and lower.x < upper.x + upper.size
    return beside and abs(upper.y + upper.size - lower.y) <= GAP


def _touch(one: Item, other: Item) -> bool:
    return all(
        getattr(one, axis) <= getattr(other, axis) + other.size + GAP
        and getattr(other, axis) <= getattr(one, axis) + one.size + GAP
        for axis in ("x", "y")
    )
