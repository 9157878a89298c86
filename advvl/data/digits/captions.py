"""Captions of scenes for pre-training: true of their scene, and false of nearly every other scene.

A caption that most scenes satisfy would make image-text matching noise, so each kind states several facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from advvl.data.digits.draws import below, pick, shuffled
from advvl.data.digits.questions import MANY, ONES, ORDINALS, one
from advvl.data.digits.scenes import SIDE, Scene


@dataclass(frozen=True)
class Caption:
    """A caption of scene number `scene`, and its kind."""

    scene: int
    kind: str
    text: str


def _listed(items: Sequence[str]) -> str:
    """ "a", "a and b", "a , b and c"."""
    return " and ".join(filter(None, (" , ".join(items[:-1]), items[-1])))


def _placed(rng: np.random.Generator, scene: Scene) -> str:
    """Two or three digits and where they are."""
    chosen = shuffled(rng, list(scene.by_cell().items()))[: 2 + below(rng, 2)]
    return " and ".join(
        f"{one(digit)} at the {ORDINALS[cell // SIDE]} row {ORDINALS[cell % SIDE]} column" for cell, digit in chosen
    )


def _tally(rng: np.random.Generator, scene: Scene) -> str:
    """The number of digits, and of each digit."""
    counts = Counter(scene.digits)
    items = [one(d) if counts[d] == 1 else f"{ONES[counts[d]]} {MANY[d]}" for d in sorted(counts)]
    return f"{ONES[len(scene)]} digits : {_listed(shuffled(rng, items))}"


def _rows(rng: np.random.Generator, scene: Scene) -> str:
    """The digits of each row, or of each column."""
    axis, line = pick(rng, tuple(enumerate(("row", "column"))))
    held = [[ONES[d] for cell, d in scene.by_cell().items() if divmod(cell, SIDE)[axis] == n] for n in range(SIDE)]
    return " ; ".join(f"{ORDINALS[n]} {line} : {' '.join(words) or 'empty'}" for n, words in enumerate(held))


KINDS: Mapping[str, Callable[[np.random.Generator, Scene], str]] = {
    "placed": _placed,
    "tally": _tally,
    "rows": _rows,
}


def describe(rng: np.random.Generator, scenes: Sequence[Scene], *, per_scene: int) -> list[Caption]:
    """Make `per_scene` captions of distinct kinds about each scene."""
    return [
        Caption(number, kind, KINDS[kind](rng, scene))
        for number, scene in enumerate(scenes)
        for kind in shuffled(rng, tuple(KINDS))[:per_scene]
    ]
