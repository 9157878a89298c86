"""Checkpoints: which are kept, that one is always whole, and what a file that cannot be resumed from is told by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advvl.errors import CheckpointError, ConfigurationError, OutputDirectoryError
from advvl.files import read_torch, write_torch
from advvl.fit.checkpoints import FORMAT, Checkpoints, OneFile, read_checkpoint, sole_run

RUN = {"options": {"clip": 1.0}, "seed": 3}


def state(done: int, scores: dict[int, float] | None = None) -> dict[str, Any]:
    made = {"format": FORMAT, "run": RUN, "done": done, "scores": scores or {}, "model": {"w": torch.ones(3) * done}}
    return made | {"optimizer": {}, "seconds": 1.5, "losses": torch.zeros(done), "skipped": (0, 0)}


def constant(model: object) -> float:
    del model
    return 0.0


class Killed(BaseException):
    """Stands for a kill at this moment."""


@contextmanager
def killed(at: int, *, after: bool) -> Iterator[list[str]]:
    """The process is gone before or after the call of that number which changes the disk; none comes later."""
    calls: list[str] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def go(*arguments: Any, **options: Any) -> Any:
            number = len(calls)
            calls.append(name)
            if number >= at + after:
                raise Killed
            result = call(*arguments, **options)
            if number == at:
                raise Killed
            return result

        return go

    with pytest.MonkeyPatch.context() as patched:
        for name in ("replace", "unlink", "fsync"):
            patched.setattr(os, name, watched(name, getattr(os, name)))
        yield calls


SCORES = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.7}
STORE = {"keep_last": 2, "keep_best": 2, "evaluate": constant}
KEPT = [4, 7, 8]


def write_all(store: Checkpoints, start: int = 1) -> None:
    for done in range(start, 9):
        store.write(state(done, {update: score for update, score in SCORES.items() if update <= done}))


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path, **STORE)
    write_all(store)
    assert list(store.files()) == KEPT
    assert [path.name for path in store.files().values()] == [f"update-{done:08d}.pt" for done in KEPT]
    assert store.latest() == tmp_path / "update-00000008.pt"
    assert store.best_file() == tmp_path / "update-00000004.pt"
    assert read_torch(store.best_file())["model"]["w"][0] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kept", "calls"),
    [
        (STORE, KEPT, 8 * 3 + 5),
        ({"keep_last": 1}, [8], 8 * 3 + 7),
    ],  # each write flushes, renames, flushes; some drop one
    ids=["two and the best", "one"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_moment_leaves_the_last_written_one_whole_and_the_rest_follows(
    tmp_path: Path, options: dict[str, Any], kept: list[int], calls: int, after: bool
) -> None:
    with killed(10**6, after=False) as seen:
        write_all(Checkpoints(directory=tmp_path / "never", **options))
    assert len(seen) == calls, "every moment is tried"
    for moment in range(calls):
        store = Checkpoints(directory=tmp_path / str(moment), **options)
        written = 0
        with killed(moment, after=after), suppress(Killed):
            for done in range(1, 9):
                store.write(state(done, {update: score for update, score in SCORES.items() if update <= done}))
                written = done
        files = store.files()
        for done, path in files.items():
            assert read_checkpoint(path, RUN)["done"] == done
        found = max(files, default=0)
        assert found in (written, written + 1)
        assert store.latest() == files.get(found)
        store.open(resume=True)
        store.tidy({update: score for update, score in SCORES.items() if update <= found})  # as a resumed run does
        write_all(store, start=found + 1)
        assert sorted(os.listdir(store.directory)) == [f"update-{done:08d}.pt" for done in kept]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(["highest", "lowest"]),
)
def test_the_last_and_the_best_are_kept_whatever_the_scores(
    tmp_path: Path, updates: list[tuple[bool, int]], last: int, best: int, kind: Any
) -> None:
    store = Checkpoints(directory=tmp_path, keep_last=last, keep_best=best, evaluate=constant, best=kind)
    scores: dict[int, float] = {}
    for path in store.files().values():
        path.unlink()
    for done, (scored, score) in enumerate(updates, 1):
        if scored:
            scores[done] = float(score)
        store.write(state(done, scores))
    ranked = sorted(scores.items(), key=lambda item: item[1] if kind == "lowest" else -item[1])  # stable: earlier first
    assert store.top(scores) == [update for update, _ in ranked[:best]]
    expected = {*range(max(1, len(updates) + 1 - last), len(updates) + 1), *store.top(scores)}
    assert set(store.files()) == expected


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    others = ["update-.pt", "update-x.pt", "update-00000001.pt.bak", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    store = Checkpoints(directory=tmp_path)
    store.open(resume=False)
    for done in (1, 2):
        store.write(state(done))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "update-00000002.pt"])


def test_what_a_killed_writer_left_is_removed_when_the_directory_is_opened(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path)
    store.write(state(1))
    (tmp_path / ".advvl-update-00000002.pt-abc.partial").write_bytes(b"half")
    store.open(resume=True)
    assert os.listdir(tmp_path) == ["update-00000001.pt"]


def test_a_directory_of_another_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path / "new")
    store.open(resume=False)
    store.write(state(1))
    with pytest.raises(OutputDirectoryError, match="got 1; resume=True to go on"):
        store.open(resume=False)
    store.open(resume=True)
    assert store.latest() is not None


def test_a_directory_without_a_scored_checkpoint_has_no_best(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path)
    with pytest.raises(CheckpointError, match="with a score"):
        store.best_file()
    store.write(state(1))
    with pytest.raises(CheckpointError, match="with a score"):
        store.best_file()


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": 0}, {"keep_last": True}, {"keep_best": -1}, {"every": 0}, {"best": "lower"}],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {next(iter(wrong))} to be"):
        Checkpoints(directory=tmp_path, **wrong)


def test_the_best_cannot_be_kept_without_scores(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected evaluate=… to keep the best 2 by"):
        Checkpoints(directory=tmp_path, keep_best=2)


def test_evaluations_come_every_so_many_updates_and_at_the_end(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path, evaluate=constant, every=4)
    assert [update for update in range(1, 11) if store.due(update, 10)] == [4, 8, 10]
    assert not any(Checkpoints(directory=tmp_path, every=4).due(update, 10) for update in range(1, 11))
    one = OneFile(tmp_path / "run.pt", constant, every=4)
    assert [update for update in range(1, 11) if one.due(update, 10)] == [4, 8, 10]
    assert not any(OneFile(tmp_path / "run.pt", every=4).due(update, 10) for update in range(1, 11))


def test_one_file_is_replaced(tmp_path: Path) -> None:
    store = OneFile(tmp_path / "run.pt")
    assert store.latest() is None
    for done in (1, 2):
        store.write(state(done))
    assert store.latest() == tmp_path / "run.pt"
    assert os.listdir(tmp_path) == ["run.pt"]
    assert read_torch(tmp_path / "run.pt")["done"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": FORMAT + 1}, rf"format {FORMAT} in .*, got format {FORMAT + 1}, written by a newer advvl"),
        ({"format": 1}, rf"format {FORMAT} in .*, got format 1, written by an older advvl"),
        ({"run": {**RUN, "options": {"clip": 2.0}}}, r"differs in options\.clip \(2\.0 there, 1\.0 here\); start"),
        ({"run": {**RUN, "seed": 4}}, r"differs in seed \(4 there, 3 here\)"),
        ({"run": {"seed": 3}}, r"differs in options\.clip \(absent there, 1\.0 here\)"),
    ],
    ids=["newer", "older", "option", "seed", "key"],
)
def test_a_checkpoint_of_another_version_or_run_is_refused_with_its_own_message(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = write_torch(tmp_path / "run.pt", state(3))
    assert read_checkpoint(file, RUN)["done"] == 3
    write_torch(file, {**state(3), **change})
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(file, RUN)


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    file = write_torch(tmp_path / "update-00000003.pt", state(3))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(
        CheckpointError, match=r"whole PyTorch file .* remove it; .* checkpoint before it is resumed from"
    ):
        read_checkpoint(file, RUN)


@pytest.mark.parametrize(
    "content", [[1, 2], {"w": torch.ones(2)}, {"format": "2", "done": 1}], ids=["list", "weights", "text"]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    file = write_torch(tmp_path / "run.pt", content)
    with pytest.raises(CheckpointError, match=r"checkpoint of a run in .*run\.pt', got something else"):
        read_checkpoint(file, RUN)


@pytest.mark.parametrize("missing", ["model", "optimizer", "losses", "run"])
def test_a_checkpoint_that_lacks_an_entry_is_refused(tmp_path: Path, missing: str) -> None:
    file = write_torch(tmp_path / "run.pt", state(3) | {missing: None})
    with pytest.raises(CheckpointError, match=f"without a usable {missing}; start"):
        read_checkpoint(file, RUN)


def test_a_directory_in_the_place_of_a_file_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(OutputDirectoryError, match=r"got a directory; give Checkpoints\(directory="):
        OneFile(tmp_path).open(resume=False)


def test_what_killed_writers_left_of_one_file_is_removed_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / ".advvl-run.pt-abc.partial").write_bytes(b"half")
    (tmp_path / ".advvl-other.pt-abc.partial").write_bytes(b"half")
    OneFile(tmp_path / "run.pt").open(resume=True)
    assert os.listdir(tmp_path) == [".advvl-other.pt-abc.partial"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_second_run_on_the_same_checkpoints_is_refused(tmp_path: Path, kind: str) -> None:
    store = Checkpoints(directory=tmp_path / "new") if kind == "directory" else OneFile(tmp_path / "new" / "run.pt")
    with sole_run(store, main=True), sole_run(None, main=True), sole_run(store, main=False):
        store.write(state(1))
        store.open(resume=True)
        with pytest.raises(OutputDirectoryError, match="no other process"):
            sole_run(store, main=True).__enter__()
    with sole_run(store, main=True):
        assert store.latest() is not None
    assert len(os.listdir(tmp_path / "new")) == 1
