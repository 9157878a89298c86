"""Questions about a scene: ten families, each with every question of its kind that the scene answers.

"Left of" means in a column further left, in whatever row; "directly left of" means the next cell of the same row.
The same goes for right, above and below. A question that names "the" seven is asked only where there is one seven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from advvl.data.digits.draws import pick
from advvl.data.digits.scenes import SIDE, Scene

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MANY = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
ORDINALS = ("first", "second", "third")
DIRECTIONS: Mapping[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

Candidates = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Question:
    """A question about scene number `scene`, its family, and its one answer."""

    scene: int
    family: str
    text: str
    answer: str


def related(cell: int, other: int, direction: str) -> bool:
    """True if `cell` lies in that direction from `other`, in whatever row or column."""
    rows, cols = DIRECTIONS[direction]
    (row, col), (other_row, other_col) = divmod(cell, SIDE), divmod(other, SIDE)
    return (row - other_row) * rows + (col - other_col) * cols > 0


def one(digit: int) -> str:
    """A digit with its article."""
    return f"{'an' if digit == 8 else 'a'} {ONES[digit]}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _exists(scene: Scene) -> Candidates:
    for digit in range(len(ONES)):
        yield f"is there {one(digit)}", _yes(digit in scene.digits)


def _count(scene: Scene) -> Candidates:
    for digit, words in enumerate(MANY):
        yield f"how many {words} are there", str(scene.digits.count(digit))


def _total(scene: Scene) -> Candidates:
    yield "how many digits are there", str(len(scene))
    for n, ordinal in enumerate(ORDINALS):
        yield f"how many digits are in the {ordinal} row", str(sum(cell // SIDE == n for cell in scene.cells))
        yield f"how many digits are in the {ordinal} column", str(sum(cell % SIDE == n for cell in scene.cells))


def _parity(scene: Scene) -> Candidates:
    odd = sum(digit % 2 for digit in scene.digits)
    yield "how many odd digits are there", str(odd)
    yield "how many even digits are there", str(len(scene) - odd)


def _at(scene: Scene) -> Candidates:
    for cell, digit in scene.by_cell().items():
        row, col = divmod(cell, SIDE)
        yield f"what digit is at the {ORDINALS[row]} row {ORDINALS[col]} column", str(digit)


def _extreme(scene: Scene) -> Candidates:
    yield "what is the largest digit", str(max(scene.digits))
    yield "what is the smallest digit", str(min(scene.digits))
    for n, ordinal in enumerate(ORDINALS):
        for axis, line in enumerate(("row", "column")):
            held = [digit for cell, digit in scene.by_cell().items() if divmod(cell, SIDE)[axis] == n]
            if len(held) > 1:
                yield f"what is the largest digit in the {ordinal} {line}", str(max(held))
                yield f"what is the smallest digit in the {ordinal} {line}", str(min(held))


def _relation(scene: Scene) -> Candidates:
    placed = scene.by_cell().items()
    for digit in sorted(set(scene.digits)):
        for other in sorted(set(scene.digits) - {digit}):
            for direction in DIRECTIONS:
                truth = any(
                    related(a, b, direction) for a, da in placed for b, db in placed if (da, db) == (digit, other)
                )
                yield f"is there {one(digit)} {direction} {one(other)}", _yes(truth)


def _unique(scene: Scene) -> dict[int, int]:
    """The cell of each digit that occurs once."""
    return {digit: cell for cell, digit in scene.by_cell().items() if scene.digits.count(digit) == 1}


def _neighbour(scene: Scene) -> Candidates:
    at = scene.by_cell()
    for digit, cell in _unique(scene).items():
        row, col = divmod(cell, SIDE)
        for direction, (rows, cols) in DIRECTIONS.items():
            inside = 0 <= row + rows < SIDE and 0 <= col + cols < SIDE
            neighbour = (row + rows) * SIDE + col + cols
            if inside and neighbour in at:
                yield f"what digit is directly {direction} the {ONES[digit]}", str(at[neighbour])


def _place(scene: Scene) -> Candidates:
    for digit, cell in _unique(scene).items():
        yield f"which row is the {ONES[digit]} in", ORDINALS[cell // SIDE]
        yield f"which column is the {ONES[digit]} in", ORDINALS[cell % SIDE]


def _more(scene: Scene) -> Candidates:
    present = sorted(set(scene.digits))
    for digit in present:
        for other in present:
            if digit != other:
                truth = scene.digits.count(digit) > scene.digits.count(other)
                yield f"are there more {MANY[digit]} than {MANY[other]}", _yes(truth)


FAMILIES: Mapping[str, Callable[[Scene], Candidates]] = {
    "exists": _exists,
    "count": _count,
    "total": _total,
    "parity": _parity,
    "at": _at,
    "extreme": _extreme,
    "relation": _relation,
    "neighbour": _neighbour,
    "place": _place,
    "more": _more,
}


ALWAYS_ASKABLE = ("exists", "count", "total", "parity", "at", "extreme")
"""The families that every scene answers; the others need two digits, or one that occurs once."""

DEFAULT_FAMILIES = ("exists", "count", "parity", "at", "extreme", "relation")


def ask(
    rng: np.random.Generator, scenes: Sequence[Scene], *, per_scene: int, families: Sequence[str] = tuple(FAMILIES)
) -> list[Question]:
    """Ask `per_scene` questions of distinct families about each scene, balanced over families and over each one's answers.

    Each question is of the family asked least so far, with the answer that family gave least so far, of those the scene
    allows; ties are drawn.
    """
    asked: Counter[str] = Counter()
    given: Counter[tuple[str, str]] = Counter()
    questions: list[Question] = []
    for number, scene in enumerate(scenes):
        open_families = {name: tuple(FAMILIES[name](scene)) for name in families}
        for _ in range(per_scene):
            possible = [name for name, candidates in open_families.items() if candidates]
            rarest = min(asked[name] for name in possible)
            family = pick(rng, [name for name in possible if asked[name] == rarest])
            candidates = open_families.pop(family)
            rarest = min(given[family, answer] for _, answer in candidates)
            text, answer = pick(rng, [c for c in candidates if given[family, c[1]] == rarest])
            asked[family] += 1
            given[family, answer] += 1
            questions.append(Question(number, family, text, answer))
    return questions
