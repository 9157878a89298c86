"""NLVR's JSON lines: a statement, whether it is true, and the objects in each of three boxes.

One object per line: `sentence`, `label` ("true" or "false"), `identifier`, `directory` and `structured_rep`, three lists of
objects with `x_loc`, `y_loc`, `size`, `type` and `color`. Other fields are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from advvl.checks import is_number, path_of, shown
from advvl.data.json_lines import read_lines
from advvl.errors import DataError

SHAPES: Final = ("square", "triangle", "circle")
COLORS: Final = ("black", "blue", "yellow")
SIDE: Final = 100
"""Pixels of a box, in width and in height."""

_COLORS: Final[Mapping[str, str]] = {"black": "black", "#0099ff": "blue", "blue": "blue", "yellow": "yellow"}
_BOXES: Final = 3
_MOST_OBJECTS: Final = 64  # in one box; the published ones have at most 8


@dataclass(frozen=True)
class Item:
    """An object in a box; `x`, `y` and `size` in pixels, from the upper left."""

    x: float
    y: float
    size: float
    shape: str
    color: str


@dataclass(frozen=True)
class Statement:
    """A sentence about three boxes.

    Arguments:
        label: True or False, as people judged it; None: not known.
        fold: the split's own cross-validation fold; examples that were shown together are in one.
    """

    identifier: str
    sentence: str
    boxes: tuple[tuple[Item, ...], ...]
    label: bool | None
    fold: str


def read_statements(path: str | os.PathLike[str]) -> list[Statement]:
    """Read a split, such as `dev.json`.

    Raises:
        DataError: a file that is missing, a line that is no JSON or no such example, with its number; an identifier twice.
    """
    path = path_of(path)
    statements: dict[str, Statement] = {}
    for number, value in read_lines(path):
        try:
            statement = _statement(value)
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"expected an example of NLVR in line {number} of {str(path)!r}, got {wrong}") from error
        if statement.identifier in statements:
            raise DataError(f"expected each identifier once in {str(path)!r}, got {statement.identifier!r} twice")
        statements[statement.identifier] = statement
    if not statements:
        raise DataError(f"expected one example or more in {str(path)!r}, got none")
    return list(statements.values())


def _statement(value: Mapping[str, Any]) -> Statement:
    label, boxes = value.get("label"), value["structured_rep"]
    if label not in ("true", "false", None):
        raise ValueError(f"label {shown(label)} for true or false")
    if not isinstance(value["sentence"], str) or not value["sentence"].strip():
        raise ValueError(f"sentence {shown(value['sentence'])} for a text")
    if not isinstance(boxes, list) or len(boxes) != _BOXES or not all(isinstance(box, list) for box in boxes):
        raise ValueError(f"structured_rep {shown(boxes)} for {_BOXES} lists of objects")
    if any(len(box) > _MOST_OBJECTS for box in boxes) or not any(boxes):
        raise ValueError(f"boxes of {[len(box) for box in boxes]} objects for at most {_MOST_OBJECTS}, not all empty")
    return Statement(
        identifier=str(value["identifier"]),
        sentence=value["sentence"].strip(),
        boxes=tuple(tuple(_item(item) for item in box) for box in boxes),
        label=None if label is None else label == "true",
        fold=str(value.get("directory", "")),
    )


def _item(value: Mapping[str, Any]) -> Item:
    x, y, size = (value[name] for name in ("x_loc", "y_loc", "size"))
    placed = all(is_number(one) and -1 <= one <= SIDE for one in (x, y, size))
    if not placed or not 0 < size <= SIDE or max(x, y) + size > SIDE + 1:
        raise ValueError(f"x_loc {shown(x)}, y_loc {shown(y)}, size {shown(size)} outside a box of {SIDE} pixels")
    color, shape = _COLORS.get(str(value["color"]).lower()), value["type"]
    if color is None or shape not in SHAPES:
        raise ValueError(f"color {shown(value['color'])}, type {shown(shape)} for {COLORS} and {SHAPES}")
    return Item(float(x), float(y), float(size), shape, color)
