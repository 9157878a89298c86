"""Checkpoints of a training run: their contents, the run that they belong to, and the rules for keeping them.

A checkpoint holds the model, the optimiser, the loss scaler, the state that the method carries in each process, the
number of finished updates with their losses and scores, and the identity of the run. The learning rate and the position
in the source follow from the number of finished updates, and all randomness from that number and the seed, so no state
of a scheduler, sampler or random number generator is needed. Files are written atomically (`advvl.files`), and reading
them runs no code from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor, nn

from advvl.checks import at_least, check_functions, choice, instance
from advvl.errors import CheckpointError, ConfigurationError, OutputDirectoryError
from advvl.files import differences, only_writer, read_torch, remove_temporaries, write_torch, writing_to
from advvl.runtime.processes import check_agreement

FORMAT: Final = 2
_NAME: Final = re.compile(r"update-(\d+)\.pt")

_ENTRIES: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("run", "scores", "model", "optimizer"), Mapping),
    **{"done": int, "seconds": int | float, "losses": Tensor, "skipped": tuple},
}

Best = Literal["highest", "lowest"]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """A directory of checkpoints, `update-00000120.pt` after 120 updates: the last few, and those of the best scores.

    A new file is complete before an old one is deleted, so there is always one after the first was written.

    Arguments:
        directory: of a single run.
        keep_last: the number of latest checkpoints to keep.
        keep_best: the number of best ones by `evaluate` to keep besides; of equal scores the earlier.
        evaluate: from the model, in eval mode, to its score; called by every process, and the main process's score
            counts.
        every: updates between evaluations; one more comes after the last update.
        best: whether a high or a low score is good.

    Raises:
        ConfigurationError: counts below what makes sense; `keep_best` without `evaluate`.
    """

    directory: Path
    keep_last: int = 1
    keep_best: int = 0
    evaluate: Evaluate | None = None
    every: int = 1000
    best: Best = "highest"

    def __post_init__(self) -> None:
        instance((str, os.PathLike), self, "directory")
        check_functions(evaluate=self.evaluate)
        at_least(1, self, "keep_last", "every")
        at_least(0, self, "keep_best")
        choice(self, "best", Best)
        if self.keep_best and self.evaluate is None:
            raise ConfigurationError(f"expected evaluate=… to keep the best {self.keep_best} by, got None")

    def files(self) -> dict[int, Path]:
        """Return the existing checkpoints by their number of updates, in increasing order."""
        found = {}
        for path in Path(self.directory).glob("update-*.pt"):
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def latest(self) -> Path | None:
        """Return the checkpoint to resume from; None: there is none yet."""
        return next(reversed(self.files().values()), None)

    def top(self, scores: Mapping[int, float]) -> list[int]:
        """Return the updates whose checkpoints have the best of these scores, `keep_best` at most, the best first."""
        sign = -1 if self.best == "highest" else 1
        return sorted(scores, key=lambda update: (sign * scores[update], update))[: self.keep_best]

    def best_file(self) -> Path:
        """Return the checkpoint of the best score, its model's weights under "model".

        Raises:
            CheckpointError: there is none.
        """
        latest, files = self.latest(), self.files()
        scores = {} if latest is None else read_torch(latest)["scores"]
        for update in self.top(scores):
            if update in files:
                return files[update]
        raise CheckpointError(
            f"expected a checkpoint with a score in {str(self.directory)!r}, got none; train with keep_best=1 and evaluate=…"
        )

    def due(self, update: int, updates: int) -> bool:
        """Return True if the model has to be evaluated after `update` of `updates` updates."""
        return _due(self, update, updates)

    def open(self, *, resume: bool) -> None:
        """Refuse a directory with another run's files, and remove what killed writers left; before a run.

        Raises:
            OutputDirectoryError: there are checkpoints, and the run does not resume.
        """
        with writing_to(self.directory):
            files = self.files()
        if files and not resume:
            raise OutputDirectoryError(
                f"expected no checkpoint in {str(self.directory)!r}, got {len(files)}; resume=True to go on from the "
                "latest, or remove them, or choose another directory"
            )
        remove_temporaries(Path(self.directory))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the directory, which is made if missing; see `advvl.files.only_writer`."""
        with writing_to(self.directory):
            Path(self.directory).mkdir(parents=True, exist_ok=True)
        with only_writer(self.directory):
            yield

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a run's state under its number of updates, and remove the checkpoints that are no longer kept."""
        write_torch(Path(self.directory) / f"update-{state['done']:08d}.pt", dict(state))
        self.tidy(state["scores"])

    def tidy(self, scores: Mapping[int, float]) -> None:
        """Remove the checkpoints that are not kept at these scores: a run killed after writing one leaves the one before."""
        files = self.files()
        kept = {*list(files)[-self.keep_last :], *self.top(scores)}
        with writing_to(self.directory):
            for update, path in files.items():
                if update not in kept:
                    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class OneFile:
    """A single file that each checkpoint replaces.

    Arguments:
        path: of the file.
        evaluate, every: as of `Checkpoints`; the scores are in the run's result alone.
    """

    path: Path
    evaluate: Evaluate | None = None
    every: int = 1000

    def __post_init__(self) -> None:
        check_functions(evaluate=self.evaluate)
        at_least(1, self, "every")

    def latest(self) -> Path | None:
        return self.path if self.path.exists() else None

    def due(self, update: int, updates: int) -> bool:
        return _due(self, update, updates)

    def top(self, scores: Mapping[int, float]) -> list[int]:
        del scores
        return []

    def open(self, *, resume: bool) -> None:
        del resume
        with writing_to(self.path):
            folder = self.path.is_dir()
        if folder:
            raise OutputDirectoryError(
                f"expected a file or nothing at {str(self.path)!r}, got a directory; give Checkpoints(directory=…)"
            )
        remove_temporaries(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with only_writer(self.path):
            yield

    def write(self, state: Mapping[str, Any]) -> None:
        write_torch(self.path, dict(state))

    def tidy(self, scores: Mapping[int, float]) -> None:
        del scores


def _due(store: Checkpoints | OneFile, update: int, updates: int) -> bool:
    return store.evaluate is not None and (update % store.every == 0 or update == updates)


@contextmanager
def sole_run(store: Checkpoints | OneFile | None, *, main: bool) -> Iterator[None]:
    """Keep other runs from the checkpoints of this one; the main process holds the lock, and all hear of a refusal.

    Raises:
        OutputDirectoryError: another process writes them, or they cannot be written.
        ConfigurationError: the same, in the other processes of this run.
    """
    refusal: OutputDirectoryError | None = None
    with ExitStack() as held:
        if store is not None and main:
            try:
                held.enter_context(store.locked())
            except OutputDirectoryError as error:
                refusal = error
        check_agreement("access to the checkpoints", str(refusal))
        if refusal is not None:
            raise refusal
        yield


def read_checkpoint(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in a checkpoint of this run.

    Raises:
        CheckpointError: a file that is damaged, of another version of the format, or of another run; it says what differs.
    """
    advice = "start without resuming, or with another file"
    try:
        state = read_torch(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; without it, the checkpoint before it is resumed from if one was kept"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("format", 1), int) or "done" not in state:
        raise CheckpointError(f"expected a checkpoint of a run in {str(path)!r}, got something else; {advice}")
    version = state.get("format", 1)
    if version != FORMAT:
        other = "a newer" if version > FORMAT else "an older"
        raise CheckpointError(
            f"expected a checkpoint of format {FORMAT} in {str(path)!r}, got format {version}, written by {other} advvl; "
            f"resume with that, or {advice}"
        )
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"expected a whole checkpoint in {str(path)!r}, got one without a usable {', '.join(wrong)}; {advice}"
        )
    if state["run"] != run:
        raise CheckpointError(
            f"expected a checkpoint of this run in {str(path)!r}, got one that differs in "
            f"{differences(state['run'], run)}; {advice}"
        )
    return state
