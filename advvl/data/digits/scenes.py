"""Scenes: a few handwritten digits in a 3x3 grid, and the regions a detector would hand to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advvl.data.digits.draws import below, pick, shuffled
from advvl.data.digits.scans import CLASSES

SIDE = 3
BOX_DIM = 7
FEWEST, MOST = 3, 6
REPEAT = 0.4
"""The chance that a digit repeats one already placed: without it nearly every count would be 0 or 1."""


@dataclass(frozen=True)
class Scene:
    """Digits in cells of the grid, in reading order: `cells` in 0..8 by rows, `digits` in 0..9, `images` their scans.

    `str(scene)` draws it, a dot for an empty cell.
    """

    cells: tuple[int, ...]
    digits: tuple[int, ...]
    images: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.cells)

    def __str__(self) -> str:
        at = self.by_cell()
        return "\n".join(" ".join(str(at.get(row * SIDE + col, "·")) for col in range(SIDE)) for row in range(SIDE))

    def by_cell(self) -> dict[int, int]:
        """The digit in each occupied cell."""
        return dict(zip(self.cells, self.digits, strict=True))


def images_by_digit(images: NDArray[np.int64], classes: NDArray[np.int64]) -> list[list[int]]:
    """The rows among `images` that show each digit: ten lists, from which scenes draw."""
    return [images[classes[images] == digit].tolist() for digit in range(CLASSES)]


def draw_scene(rng: np.random.Generator, pool: Sequence[Sequence[int]]) -> Scene:
    """A scene of 3 to 6 digits in distinct cells; `pool[d]` lists the images that may show digit d."""
    count = FEWEST + below(rng, MOST - FEWEST + 1)
    cells = sorted(shuffled(rng, range(SIDE * SIDE))[:count])
    digits: list[int] = []
    for _ in cells:
        digits.append(pick(rng, digits) if digits and rng.random() < REPEAT else below(rng, CLASSES))
    digits = shuffled(rng, digits)
    return Scene(tuple(cells), tuple(digits), tuple(pick(rng, pool[digit]) for digit in digits))


def box(cell: int) -> tuple[float, ...]:
    """UNITER's seven numbers for a cell: x1, y1, x2, y2, width, height and area, in units of the whole scene."""
    row, col = divmod(cell, SIDE)
    return (col / SIDE, row / SIDE, (col + 1) / SIDE, (row + 1) / SIDE, 1 / SIDE, 1 / SIDE, 1 / SIDE**2)
