"""The time that is left, and how it is shared among what is still to be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Seconds that count down from the construction on.

    Arguments:
        seconds: in all.
        clock: reads the time in seconds.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self._start

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def share(self, weight: float, others: Sequence[float]) -> float:
        """The part of the time left for work of this weight, where work of the other weights still follows."""
        return self.left * weight / (weight + sum(others))
