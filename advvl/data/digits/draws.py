"""Draws that are the same everywhere: numpy guarantees the stream of a bit generator, not of `integers` or `permutation`.

So every draw here comes from `Generator.random()`, which is the bit stream scaled to [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return an independent stream of draws for each `(seed, *key)`."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def below(rng: np.random.Generator, bound: int) -> int:
    """Draw a whole number in [0, bound), each equally likely."""
    return int(rng.random() * bound)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Draw one of `items`, each equally likely."""
    return items[below(rng, len(items))]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """Return `items` in a random order."""
    return [items[i] for i in np.argsort(rng.random(len(items)), kind="stable")]
