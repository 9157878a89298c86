"""Processes for the tests: a function of a test module in several of them, in bounded time whatever happens to one.

They are forked by a server that has imported everything once: that takes longer than most of them run.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
TIMEOUT = 60.0  # seconds that a collective waits for the others: a bound for hangs, far from what any of them takes
LIMIT = 200.0  # seconds that a process may live: such a bound too
RAISED = "raised"  # the key of how a case raised


@dataclass(frozen=True)
class Ended:
    """How a process ended; `code` is None for one that had to be stopped."""

    code: int | None
    output: str


def spawn(
    function: str, processes: int, folder: Path, *, limit: float = LIMIT, timeout: float = TIMEOUT
) -> list[Ended]:
    """Run `"module:function"`, of rank and folder, in processes that form a gloo group; none outlives `limit` seconds."""
    arguments = [(function, processes, str(folder), timeout, rank) for rank in range(processes)]
    running = [server().Process(target=work, args=each) for each in arguments]
    for process in running:
        process.start()
    end, ended = time.monotonic() + limit, []
    try:
        for rank, process in enumerate(running):
            process.join(max(0.1, end - time.monotonic()))
            said = folder / f"{rank}.txt"
            ended.append(Ended(process.exitcode, said.read_text() if said.exists() else ""))
    finally:
        for process in running:
            process.kill()
            process.join()
    return ended


@cache
def server() -> ForkServerContext:
    """Start what forks the processes, one for all tests of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.distributed_cases", "advvl.experiments.uniter", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def environment() -> dict[str, str]:
    """Of processes of one thread that import tests and the package."""
    return {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}


def run(commands: list[list[str]], *, limit: float, variables: dict[str, str] | None = None) -> list[Ended]:
    """Run commands beside each other; what is left of them after `limit` seconds is killed."""
    running = [
        subprocess.Popen(
            command,
            env={**environment(), **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    end, ended = time.monotonic() + limit, []
    try:
        for process in running:
            try:
                output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
                ended.append(Ended(process.returncode, output))
            except subprocess.TimeoutExpired:
                ended.append(Ended(None, "still running"))
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.communicate()
    return ended


class Script:
    """A script that runs beside the test, as `python -W error::UserWarning SCRIPT ARGUMENTS` would run it.

    Arguments:
        folder: of the files that take what it writes.
    """

    def __init__(self, script: Path, *arguments: object, folder: Path) -> None:
        words = [str(script), *map(str, arguments)]
        self.said = tuple(Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2))
        self.process = server().Process(target=_be_script, args=(words, *self.said))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def finish(self, limit: float = 300.0) -> tuple[int | None, str, str]:
        """Wait for its end, and return its status with what it wrote to stdout and stderr."""
        self.process.join(limit)
        self.process.kill()
        out, err = (path.read_text() for path in self.said)
        return self.process.exitcode, out, err


def _be_script(words: list[str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        with path.open("wb", buffering=0) as stream:
            os.dup2(stream.fileno(), number)
    sys.argv[:] = words
    sys.path.insert(0, str(Path(words[0]).parent))
    warnings.filterwarnings("error", category=UserWarning)
    runpy.run_path(words[0], run_name="__main__")


class Found(dict[str, Any]):
    """What a process found, by case; a case that raised there raises where it is looked up."""

    def __getitem__(self, case: str) -> Any:
        found = super().__getitem__(case)
        if isinstance(found, dict) and found.keys() == {RAISED}:
            raise AssertionError(f"{case!r} raised in a process:\n{found[RAISED]}")
        return found


def attempt(run: Callable[[], Any]) -> Any:
    """What a case comes to, or how it raised: for its own test to show, while the others go on.

    It must raise in all processes alike; where one goes on, it ends by its timeout, and with it what follows.
    """
    try:
        return run()
    except Exception:
        return {RAISED: traceback.format_exc()}


def results(function: str, processes: int, folder: Path, *, limit: float = LIMIT) -> list[dict[str, Any]]:
    """What a function returned in each process, by rank; all of them have to end well."""
    ended = spawn(function, processes, folder, limit=limit)
    assert all(process.code == 0 for process in ended), "\n".join(process.output for process in ended)
    return [Found(torch.load(folder / f"{rank}.pt", weights_only=True)) for rank in range(processes)]


def shared_results(function: str, processes: int) -> Any:
    """A fixture: the results of a function, found once for all tests of a module."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        return results(function, processes, tmp_path_factory.mktemp("processes"))

    return found


def work(function: str, processes: int, folder: str, timeout: float, rank: int) -> None:
    """Be one of the processes."""
    with open(f"{folder}/{rank}.txt", "wb", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    module, _, name = function.partition(":")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        found = getattr(importlib.import_module(module), name)(rank, Path(folder))
        torch.save(found, f"{folder}/{rank}.pt")
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # gloo's threads may abort an interpreter that winds up by itself, and with another code
    leave()


def leave() -> None:
    """End this process once all have come here."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that goes on to end by itself
