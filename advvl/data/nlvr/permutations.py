"""Changes of a statement and its boxes that keep its truth: other colours and shapes, boxes in another order or mirrored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from advvl.data.nlvr.statements import COLORS, SHAPES, SIDE, Item, Statement

_SIDES: Final = re.compile(r"left|right", re.IGNORECASE)
_NOT_SHAPES: Final = re.compile(r"gr[ea]y|block|squere|cirlce|tower", re.IGNORECASE)
"""Words of a sentence in which a square may be a box or any object, or a shape is misspelt."""


def permuted(statement: Statement, generator: torch.Generator) -> Statement:
    """Return a statement of the same truth, drawn from all that follow from this one.

    Colours are exchanged in the sentence and in the boxes alike; so are shapes, where the sentence names them by their own
    words alone. The boxes are reordered, and mirrored unless the sentence speaks of left or right.
    """
    colors = _exchange(COLORS, _order(len(COLORS), generator))
    shapes = _exchange(SHAPES, _order(len(SHAPES), generator))
    order, mirrored = _order(len(statement.boxes), generator), bool(torch.rand((), generator=generator) < 0.5)
    if _NOT_SHAPES.search(statement.sentence) or _is_tower(statement):
        shapes = {}
    mirrored = mirrored and not _SIDES.search(statement.sentence)
    boxes = [[_changed(item, colors, shapes, mirrored=mirrored) for item in statement.boxes[place]] for place in order]
    return replace(
        statement, sentence=_said(statement.sentence, {**colors, **shapes}), boxes=tuple(tuple(box) for box in boxes)
    )


def permutations(statements: Sequence[Statement], copies: int, seed: int) -> list[Statement]:
    """Return the statements, and so many permuted copies of each less one; the order is that of the statements."""
    generator = torch.Generator().manual_seed(seed)
    return [
        replace(permuted(one, generator), identifier=f"{one.identifier}.{copy}") if copy else one
        for one in statements
        for copy in range(copies)
    ]


def _order(count: int, generator: torch.Generator) -> list[int]:
    drawn: Tensor = torch.randperm(count, generator=generator)
    return [int(place) for place in drawn]


def _exchange(names: Sequence[str], order: Sequence[int]) -> dict[str, str]:
    return {name: names[place] for name, place in zip(names, order, strict=True)}


def _is_tower(statement: Statement) -> bool:
    """Towers are of squares alone, of one size, which stand on each other."""
    items = [item for box in statement.boxes for item in box]
    return {item.shape for item in items} == {"square"} and len({item.x for item in items}) == 1


def _changed(item: Item, colors: Mapping[str, str], shapes: Mapping[str, str], *, mirrored: bool) -> Item:
    return replace(
        item,
        x=SIDE - item.x - item.size if mirrored else item.x,
        color=colors[item.color],
        shape=shapes.get(item.shape, item.shape),
    )


def _said(sentence: str, words: Mapping[str, str]) -> str:
    """Exchange words, in the plural too, in lower case."""
    named = "|".join(words)
    return re.sub(f"({named})", lambda found: words[found[0].lower()], sentence, flags=re.IGNORECASE)
