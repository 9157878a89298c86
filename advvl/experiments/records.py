"""The records of trained models, and whether the files that they speak of are still those."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advvl.errors import CheckpointError, ConfigurationError
from advvl.experiments.experiment import Row, Task
from advvl.files import read_json


def read_record(directory: Path, task: Task) -> Mapping[str, Any]:
    """Return a task's record; its model's file is the one that was recorded.

    Raises:
        CheckpointError: no record, or a file that is missing or another one.
    """
    path, weights = directory / task.record, directory / task.weights
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        raise CheckpointError(f"expected a record with a sha256 in {str(path)!r}, got none; remove it to train again")
    found = sha256(weights) if weights.is_file() else "no file"
    if found != record["sha256"]:
        raise CheckpointError(
            f"expected {str(weights)!r} with the recorded SHA-256 {record['sha256'][:12]}…, got {found[:12]}; remove "
            f"{str(path)!r} to train it again"
        )
    return record


def check_records(directory: Path, tasks: Sequence[Task]) -> None:
    """Check the records that there are, and that each start which this run does not train is there.

    Raises:
        CheckpointError: a model's file is not the recorded one, or began from another file than is there now.
        ConfigurationError: a row's start was not trained.
    """
    trained = {task.weights for task in tasks}
    for task in tasks:
        start = start_of(directory, task)
        if isinstance(task.row.start, Row):
            wanted = Task(task.seed, task.row.start)
            if wanted.weights not in trained:
                if not (directory / wanted.record).exists():
                    raise ConfigurationError(
                        f"expected stage one of seed {task.seed} at {str(start)!r}, got none; run --stage pretrain or "
                        "--stage all, or give --checkpoint"
                    )
                read_record(directory, wanted)
        if (directory / task.record).exists():
            record = read_record(directory, task)
            began = record.get("start")
            if (
                start is not None
                and start.is_file()
                and isinstance(began, dict)
                and began.get("sha256") != sha256(start)
            ):
                raise CheckpointError(
                    f"expected {task.name} to begin from {str(start)!r} as it is, got a record of another file; remove "
                    f"{str(directory / task.record)!r} to train it again"
                )


def start_of(directory: Path, task: Task) -> Path | None:
    """Return the file at whose weights a task begins; None: it begins at those drawn from the seed."""
    start = task.row.start
    return directory / Task(task.seed, start).weights if isinstance(start, Row) else start


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    hashed = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()
