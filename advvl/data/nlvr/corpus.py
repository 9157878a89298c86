"""NLVR for UNITER: a region is an object, the three boxes of a picture are one sequence of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from advvl.data.nlvr.statements import COLORS, SHAPES, SIDE, Item, Statement
from advvl.data.uniter.batching import Images, pad_texts
from advvl.data.uniter.sources import LabelledSource
from advvl.data.wordpiece import token_ids
from advvl.errors import DataError

BOXES: Final = 3

FEATURES: Final = len(SHAPES) + len(COLORS) + BOXES + 3
"""Numbers of a region: shape, colour and box as one of three each, and place and size over the side of its box."""


def statement_source(statements: Sequence[Statement], tokenizer: Tokenizer) -> LabelledSource:
    """Make UNITER's batches of statements; with `targets` (B,), 1 for a true one, where labels are known.

    A region's box lies in the picture of three boxes side by side.

    Raises:
        DataError: no statement, or some with a label and some without.
    """
    known = [statement.label is not None for statement in statements]
    if not statements or any(known) != all(known):
        raise DataError(f"expected statements that all have a label or all none, got {sum(known)} of {len(known)}")
    items = [[(place, item) for place, box in enumerate(one.boxes) for item in box] for one in statements]
    labels = {"targets": torch.tensor([int(bool(one.label)) for one in statements])} if all(known) else {}
    return LabelledSource(
        pad_texts(token_ids(tokenizer, (one.sentence for one in statements))),
        Images(
            features=pad_sequence([torch.tensor([_feature(*one) for one in row]) for row in items], batch_first=True),
            boxes=pad_sequence([torch.tensor([_box(*one) for one in row]) for row in items], batch_first=True),
            lengths=torch.tensor([len(row) for row in items]),
            labels=torch.zeros(len(items), 0, 0),  # of regions: there are no classes
        ),
        torch.arange(len(statements)),
        labels=labels,
    )


def _feature(place: int, item: Item) -> list[float]:
    kinds = [float(item.shape == shape) for shape in SHAPES] + [float(item.color == color) for color in COLORS]
    return [*kinds, *(float(place == box) for box in range(BOXES)), item.x / SIDE, item.y / SIDE, item.size / SIDE]


def _box(place: int, item: Item) -> list[float]:
    left, top = (place + item.x / SIDE) / BOXES, item.y / SIDE
    width, height = item.size / SIDE / BOXES, item.size / SIDE
    return [left, top, left + width, top + height, width, height, width * height]
