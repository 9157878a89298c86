"""Workers share the work, tell when they fail, and do not outlive who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import advvl.experiments.jobs
from advvl.errors import ConfigurationError
from advvl.experiments.jobs import WorkerError, share_out

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


PATIENCE = 300  # seconds: a bound for hangs, far from what a worker takes
Handle = Callable[[int], None]


@contextmanager
def write_down(index: int, directory: Path) -> Iterator[Handle]:
    yield lambda item: (directory / str(item)).touch()
    (directory / "closed").touch()


@contextmanager
def meet(index: int, directory: Path) -> Iterator[Handle]:
    """Item 0 is done once item 1 is: two workers get there, one never would."""

    def handle(item: int) -> None:
        (directory / str(item)).write_text(str(os.getpid()))
        assert within(PATIENCE, (directory / "1").exists)

    yield handle


@contextmanager
def refuse(index: int, directory: Path) -> Iterator[Handle]:
    def handle(item: int) -> None:
        (directory / str(os.getpid())).touch()
        if item == 1:
            raise ConfigurationError("expected no 1, got one")
        time.sleep(2 * PATIENCE)

    yield handle


@contextmanager
def sleep(index: int, directory: Path) -> Iterator[Handle]:
    def handle(item: int) -> None:
        (directory / str(os.getpid())).touch()
        time.sleep(2 * PATIENCE)

    yield handle


@pytest.mark.slow
def test_every_item_is_taken_by_a_worker_that_is_opened_and_closed(tmp_path: Path) -> None:
    share_out(write_down, [0, 1, 2], tmp_path, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "closed"]


@pytest.mark.slow
def test_workers_work_at_the_same_time(tmp_path: Path) -> None:
    share_out(meet, [0, 1], tmp_path, jobs=5)
    pids = [path.read_text() for path in tmp_path.iterdir()]
    assert len(set(pids)) == len(pids) == 2


@pytest.mark.slow
def test_a_worker_that_fails_stops_the_others_and_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerError, match="status 1"):
        share_out(refuse, [0, 1], tmp_path, jobs=2)
    assert "error: expected no 1, got one" in capfd.readouterr().err
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_workers_end_with_who_started_them(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from experiments.test_jobs import *\n"
        "if __name__ == '__main__': share_out(sleep, [0, 1], Path(sys.argv[2]), jobs=2)"
    )
    file = tmp_path / "script.py"
    file.write_text(script)
    pids = tmp_path / "pids"
    pids.mkdir()
    root = str(Path(advvl.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, str(file), str(Path(__file__).parents[1]), str(pids)],
        env=os.environ | {"PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert within(PATIENCE, lambda: len(list(pids.iterdir())) == 2)
        parent.send_signal(number)
        assert parent.wait(PATIENCE) == (-number if number == signal.SIGKILL else 128 + number)
        assert within(PATIENCE, lambda: not any(alive(int(path.name)) for path in pids.iterdir()))
    finally:
        parent.kill()
        parent.wait()


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
