"""Progress of a run: how many of its models are trained, by which process ever, and the time that the others take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from advvl.experiments.experiment import Task


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


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts: "1 model", "2 models"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Write seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
