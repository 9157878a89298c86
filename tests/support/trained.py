"""The command `advvl`, noting the examples of its training batches, and killed if asked: `trained.py NOTES BATCHES WORDS…`.

Each process appends the examples of each batch to NOTES/RANK.jsonl, and kills itself like the system does before it makes
batch number BATCHES; a negative number: never.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from advvl.data.mixing import MixedSource
from advvl.experiments.cli import main


def noting(made: Callable[..., Any], notes: Path, last: int) -> Callable[..., Any]:
    """Return `MixedSource.batch`, which notes what it is asked for."""
    notes.mkdir(exist_ok=True)
    path, count = notes / f"{os.environ.get('RANK', '0')}.jsonl", 0

    def batch(source: MixedSource, indices: Sequence[int], *rest: Any) -> Any:
        nonlocal count
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(sorted(int(index) for index in indices)) + "\n")
        return made(source, indices, *rest)

    return batch


def noted(notes: Path) -> list[list[list[int]]]:
    """The examples of each batch, by process."""
    return [list(map(json.loads, path.read_text().splitlines())) for path in sorted(notes.glob("*.jsonl"))]


if __name__ == "__main__":
    MixedSource.batch = noting(MixedSource.batch, Path(sys.argv[1]), int(sys.argv[2]))  # type: ignore[method-assign]
    sys.exit(main(sys.argv[3:]))
