"""`make gpu-check` on a machine without a GPU: its record, its time, and every section at tiny sizes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.check import Check, Command, Section
from benchmarks.gpu.lines import Row, append, append_row, read, write_atomically
from benchmarks.gpu.plan import BENCHMARKS, ROOT, Options, environment, gpu_tests, pytest_of, sections
from benchmarks.gpu.record import Record
from benchmarks.gpu.setting import Setting, Skipped

pytestmark = pytest.mark.slow  # several processes

REFUSED = ("hypothesis", "accelerate", "matplotlib", "captum", "scipy", "sklearn", "peft", "torchattacks", "foolbox")
HOOK = f"""
import importlib.machinery as machinery
import socket
import sys

found = machinery.PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {REFUSED!r} else found(name, path, target)

def watch(event, arguments):
    if event == "open" and "/shared/" in str(arguments[0]) or event == "socket.connect":
        sys.stderr.write(f"REACHED OUT: {{event}} {{arguments!r}}\\n")
        raise OSError(f"not here: {{event}} {{arguments!r}}")

machinery.PathFinder.find_spec = classmethod(find_spec)
sys.addaudithook(watch)
"""


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


# --- the record ---


def test_the_json_is_whole_after_every_line(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.mark("kernels", status="running")
    for count in range(1, 4):
        append_row(record.lines, Row("kernels", f"case {count}", "speed", value=float(count)))
        record.fold()
        assert [row["case"] for row in content(tmp_path)["rows"]] == [f"case {n + 1}" for n in range(count)]
        assert f"case {count}" in (tmp_path / "results.md").read_text()
    assert not content(tmp_path)["finished"]


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "facts", {"device": "one"})
    with open(path, "a") as stream:
        stream.write('{"kind": "ro')
    lines, offset = read(path, 0)
    assert [line["kind"] for line in lines] == ["facts"]
    assert read(path, offset) == ([], offset)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("status", ["measured", "failed", "skipped", "not run"])
def test_a_failure_is_what_fails_and_not_a_goal_that_is_missed(tmp_path: Path, status: Any) -> None:
    record = Record(tmp_path)
    record.mark("kernels", status="done")
    append_row(record.lines, Row("kernels", "case", "speed", status=status, goal="at least 1", reached=False))
    record.fold()
    assert record.failed == (status == "failed")


# --- the time ---


class Clock:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Process:
    """A process that ends by itself after so many seconds of a clock."""

    pid = -1

    def __init__(self, clock: Clock, seconds: float, code: int = 0) -> None:
        self.clock, self.end, self.code, self.killed = clock, clock() + seconds, code, False

    def poll(self) -> int | None:
        return -9 if self.killed else self.code if self.clock() >= self.end else None

    def wait(self) -> int:
        return -9


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, each: Sequence[float], code: int = 0
) -> Record:
    """Sections whose processes would take this long, in this many seconds."""
    clock, started = Clock(), list[Process]()
    monkeypatch.setattr(os, "killpg", lambda *_: setattr(started[-1], "killed", True))

    def start(command: Command, log: Path) -> Any:
        started.append(Process(clock, float(command.arguments[0]), code))
        return started[-1]

    chosen = [Section(f"s{n}", 1.0, lambda _, took=took: [Command([str(took)], {})]) for n, took in enumerate(each)]
    record = Record(tmp_path)
    Check(chosen, record, Budget(seconds, clock), start, clock.sleep).run()
    assert clock() <= seconds + 1
    return record


def test_sections_that_are_quick_all_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run(tmp_path, monkeypatch, 100, [1, 2, 3])
    assert [section["status"] for section in record.sections.values()] == ["done"] * 3
    assert content(tmp_path)["finished"]
    assert not record.failed


def test_a_section_that_hangs_is_stopped_and_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run(tmp_path, monkeypatch, 90, [1e9, 1, 1e9])
    assert [section["status"] for section in record.sections.values()] == ["stopped", "done", "stopped"]
    assert record.sections["s2"]["seconds"] > record.sections["s0"]["seconds"] == 30.0
    assert record.finished


def test_sections_without_time_are_recorded_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run(tmp_path, monkeypatch, 12, [1e9, 1e9, 1e9])
    assert [section["status"] for section in record.sections.values()] == ["not run", "stopped", "stopped"]
    assert record.sections["s0"]["note"] == "out of time"


def test_a_process_that_breaks_off_fails_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run(tmp_path, monkeypatch, 100, [1], code=-11)
    assert record.sections["s0"]["status"] == "failed"
    assert record.failed


def test_a_case_after_the_sections_time_is_recorded_as_not_run(tmp_path: Path) -> None:
    clock = Clock()
    setting = Setting("kernels", torch.device("cpu"), True, Budget(10.0, clock), tmp_path / "lines")

    def skip() -> None:
        clock.sleep(11)
        raise Skipped("no memory")

    def fail() -> None:
        raise AssertionError("expected not to be called")

    setting.measure("one", skip)
    setting.measure("two", fail)
    rows = [line["content"] for line in read(setting.lines, 0)[0]]
    assert [(row["status"], row["note"]) for row in rows] == [("skipped", "no memory"), ("not run", "out of time")]


# --- the sections ---


def test_every_section_comes_in_its_order_with_a_time_of_its_own(tmp_path: Path) -> None:
    found = sections(Options("cuda", False, tmp_path / "lines"))
    assert [section.name for section in found] == ["kernel tests", "gpu tests", *BENCHMARKS]
    assert sum(section.weight for section in found) <= 8 * 60
    assert "tests/test_gpu.py" in gpu_tests()
    for section in found:
        assert section.commands(10.0)


@pytest.mark.parametrize("section", BENCHMARKS)
def test_every_section_has_rows_at_tiny_sizes(section: str, tmp_path: Path) -> None:
    """Without Triton's interpreter, which is there in processes of their own, the kernels say why they are skipped."""
    setting = Setting(section, torch.device("cpu"), True, Budget(300.0), tmp_path / "lines")
    importlib.import_module(f"benchmarks.gpu.sections.{section}").run(setting)
    rows = [line["content"] for line in read(setting.lines, 0)[0]]
    assert rows
    assert [row for row in rows if row["status"] == "failed"] == []
    for row in rows:
        assert row["note"] or row["value"] is not None
        assert row["section"] == section


def test_it_runs_where_only_torch_transformers_and_pytest_are_and_reaches_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--smoke", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--only", "gpu tests", "kernels", "villa"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, logs = content(tmp_path / "out"), [path.read_text() for path in (tmp_path / "out").glob("*.log")]
    assert found["finished"]
    assert [section["status"] for section in found["sections"].values()] == ["done"] * 3
    assert not any("REACHED OUT" in log for log in logs)
    measured = {row["section"] for row in found["rows"] if row["status"] == "measured"}
    assert measured == {"kernels", "villa"}
    assert {test["status"] for test in found["tests"]} == {"skipped"}


def test_the_hook_of_the_test_above_can_fail(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "shared").mkdir()
    page = tmp_path / "shared" / "page.md"
    page.write_text("")
    for code in ("import hypothesis", f"open({str(page)!r})", "import scipy.stats"):
        assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert "expected a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_kill_in_the_middle_leaves_what_was_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--smoke", "--out", str(tmp_path)]
    running = subprocess.Popen(
        [*command, "--only", "starts"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "results.json").exists() or not content(tmp_path)["facts"]:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    found = content(tmp_path)
    assert not found["finished"]
    assert found["facts"]["kind"] == "cpu"
    assert found["sections"]["starts"]["status"] == "running"


def test_a_test_that_fails_makes_the_command_fail_after_everything_ran(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text("import nowhere\n")
    more = ["import pytest", "def test_a(): assert 1 == 2", "def test_b(): pytest.skip('no GPU')", "def test_c(): ..."]
    (tmp_path / "test_more.py").write_text("\n".join(more))
    record = Record(tmp_path / "out")
    options = Options("cpu", True, record.lines)
    files = [str(failing), str(tmp_path / "test_more.py"), "-c", str(ROOT / "setup.cfg"), "--rootdir", str(tmp_path)]
    section = Section("tests", 1.0, pytest_of("tests", options, files))
    after = Section("after", 1.0, lambda _: [Command([sys.executable, "-c", ""], environment(options))])
    assert not Check([section, after], record, Budget(300.0)).run()
    found = {test["test"].rpartition("::")[2]: test["status"] for test in record.tests}
    assert found == {"test_failing.py": "skipped", "test_a": "failed", "test_b": "skipped", "test_c": "passed"}
    assert [test["note"] for test in record.tests if test["status"] == "failed"] == ["call: assert 1 == 2"]
    assert record.sections["after"]["status"] == "done"
