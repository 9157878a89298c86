"""Which sections there are, in their order, and what share of the time each has. Standard library alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.check import Command, Section

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = "tests/ops/test_triton.py"
# Of the benchmarks: the module in `sections` of the same name holds `run`. The number is about the seconds it needs.
BENCHMARKS = {
    "kernels": 50.0,
    "second_read": 20.0,
    "packed": 15.0,
    "huge": 25.0,
    "launches": 20.0,
    "villa": 90.0,
    "rules": 35.0,
    "compiled": 45.0,
    "starts": 15.0,
}
PYTEST_FINE = (0, 1, 2, 5)  # passed; some failed (the outcomes say so); stopped when its time was over; none there


@dataclass(frozen=True)
class Options:
    """What the command was given.

    Arguments:
        device: "cuda" or "cpu".
        smoke: tiny sizes, one round of each: does it run? Its figures say nothing.
    """

    device: str
    smoke: bool
    lines: Path


def sections(options: Options) -> list[Section]:
    tests = [
        Section("kernel tests", 110.0, pytest_of("kernel tests", options, kernel_tests(options))),
        Section("gpu tests", 40.0, pytest_of("gpu tests", options, gpu_tests())),
    ]
    return [*tests, *(Section(name, weight, _worker(name, options)) for name, weight in BENCHMARKS.items())]


def kernel_tests(options: Options) -> list[str]:
    """All of them; in a smoke run those few that do not take long under the interpreter."""
    return [KERNEL_TESTS, *(["-k", "test_in_place_writes"] if options.smoke else [])]


def gpu_tests() -> list[str]:
    """Every other file that has a test marked `gpu`."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    return ["-m", "gpu", *(str(path.relative_to(ROOT)) for path in files if path != ROOT / KERNEL_TESTS)]


def pytest_of(section: str, options: Options, arguments: Sequence[str]) -> Callable[[float], list[Command]]:
    cores = len(os.sched_getaffinity(0))
    shards = 1 if options.smoke else max(1, min(8, cores // 2))  # the kernels' compiler takes most of the time

    def commands(seconds: float) -> list[Command]:
        given = {"section": section, "lines": str(options.lines), "shards": shards, "seconds": seconds}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", *arguments]
        return [
            Command(command, environment(options) | {"ADVVL_GPU_CHECK": json.dumps(given | {"shard": n})}, PYTEST_FINE)
            for n in range(shards)
        ]

    return commands


def _worker(section: str, options: Options) -> Callable[[float], list[Command]]:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}

    def commands(seconds: float) -> list[Command]:
        text = json.dumps(given | {"section": section, "seconds": seconds})
        return [Command([sys.executable, "-m", "benchmarks.gpu.worker", text], environment(options))]

    return commands


def environment(options: Options) -> dict[str, str]:
    """The checkout's own code first; on a CPU the kernels are interpreted, and no test sees a GPU."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    found = {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])), "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        return found | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # as deterministic algorithms need it
