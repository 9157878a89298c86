"""Runs the sections one after another, each in processes of its own that are stopped when its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.record import Record

LEAST, GRACE, PAUSE = 5.0, 5.0, 0.1  # seconds: of a section worth starting; for ending by itself; between two looks


@dataclass(frozen=True)
class Command:
    """A process of a section; what it sets beside the environment, and the exit codes that are no failure."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    fine: Sequence[int] = (0,)


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Arguments:
        weight: its share of the time, among the sections that are still to come.
        commands: from the seconds that the section has to its processes, which run beside each other.
    """

    name: str
    weight: float
    commands: Callable[[float], Sequence[Command]]


Start = Callable[[Command, Path], "subprocess.Popen[bytes]"]


def start(command: Command, log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, its output behind what the log holds."""
    with open(log, "ab") as stream:
        return subprocess.Popen(
            list(command.arguments),
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Check:
    """The whole check.

    Arguments:
        start: starts a process; `sleep` waits for so many seconds.
    """

    sections: Sequence[Section]
    record: Record
    budget: Budget
    start: Start = start
    sleep: Callable[[float], object] = time.sleep

    def run(self) -> bool:
        """Whether nothing failed."""
        for section in self.sections:
            self.record.mark(section.name, status="waiting")
        for index, section in enumerate(self.sections):
            seconds = self.budget.share(section.weight, [later.weight for later in self.sections[index + 1 :]])
            if seconds < LEAST:
                self.record.mark(section.name, status="not run", note="out of time")
                continue
            self._run(section, seconds)
        self.record.finished = True
        self.record.mark_spent(self.budget.spent)
        return not self.record.failed

    def _run(self, section: Section, seconds: float) -> None:
        begun, log = self.budget.spent, self.record.folder / f"{section.name}.log"
        log.write_bytes(b"")
        self.record.mark(section.name, status="running", allowed=round(seconds, 1))
        commands = section.commands(max(seconds - GRACE, LEAST / 2))
        with self._started(commands, log) as processes:
            while (over := self.budget.spent - begun) < seconds and any(p.poll() is None for p in processes):
                self.record.fold()
                self.sleep(PAUSE)
            codes = [process.poll() for process in processes]
        self.record.fold()
        spent = round(self.budget.spent - begun, 1)
        bad = [code for code, command in zip(codes, commands, strict=True) if code not in (None, *command.fine)]
        if bad:
            note = f"a process ended with {bad[0]}; {log.name} ends: {_end(log)}"
            self.record.mark(section.name, status="failed", seconds=spent, note=note)
        elif None in codes:
            self.record.mark(section.name, status="stopped", seconds=spent, note=f"out of its {over:.0f} s")
        elif missing := self.record.tests_missing(section.name):
            self.record.mark(
                section.name, status="stopped", seconds=spent, note=f"{missing} tests not run: out of time"
            )
        else:
            self.record.mark(section.name, status="done", seconds=spent)

    @contextmanager
    def _started(self, commands: Sequence[Command], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The section's processes; those that still run at the end are killed with all that they started."""
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                processes.append(self.start(command, log))
            yield processes
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _end(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:]
