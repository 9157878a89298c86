"""Progress of a run: how many of its models are trained, by which process ever, and the time that the others take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.experiments.experiment import Task
from advvl.runtime.processes import process_index

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """The tasks of a run, when it began, and what those that were done by then had cost; made by `Progress.of`."""

    directory: Path
    tasks: Sequence[Task]
    began: float
    before: float

    @classmethod
    def of(cls, directory: Path, tasks: Sequence[Task]) -> Progress:
        """Begin to count."""
        done = sum(task.row.cost for task in tasks if (directory / task.record).exists())
        return cls(directory, tasks, time.time(), done)

    def now(self) -> str:
        """Say how many of the models are done and, from the costs of their rows, how long the others will take."""
        done = [task for task in self.tasks if (self.directory / task.record).exists()]
        cost = sum(task.row.cost for task in done)
        text = f"{len(done)} of {counted(len(self.tasks), 'model')}"
        if cost <= self.before or len(done) == len(self.tasks):
            return text
        rate = (time.time() - self.began) / (cost - self.before)
        return f"{text}, about {duration(rate * (sum(task.row.cost for task in self.tasks) - cost))} left"


def timed(items: Sequence[T], description: str) -> Iterable[T]:
    """Show a bar with the time left while items are gone through, in the main process and in a terminal alone."""
    shown: Iterable[T] = tqdm(items, desc=description, leave=False, disable=True if process_index() else None)
    return shown


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts: "1 model", "2 models"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Write seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
