"""The command `advvl`, noting the batches that it attacks, and killed if asked: `measured.py NOTES BATCHES WORDS…`.

Each process appends the number of each batch to NOTES/RANK.txt. The last one kills itself, as the system does, before it
attacks its batch number BATCHES, counted over all models from 0; a negative number: never.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from advvl.evaluation import worst_case
from advvl.experiments.cli import main


def note(notes: Path, last: int) -> None:
    """Have `worst_case` note its batches."""
    notes.mkdir(exist_ok=True)
    rank, count, record = int(os.environ.get("RANK", "0")), 0, worst_case._record
    path, final = notes / f"{rank}.txt", rank == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def noted(plan: Any, number: int, *rest: Any, **more: Any) -> Any:
        nonlocal count
        if final and count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{number}\n")
        return record(plan, number, *rest, **more)

    worst_case._record = noted


def batches(notes: Path) -> list[list[int]]:
    """The numbers of the batches that each process attacked."""
    return [list(map(int, path.read_text().split())) for path in sorted(notes.glob("*.txt"))]


if __name__ == "__main__":
    note(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
