"""What is measured beside time: operations, memory, and what a figure has to be read with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from support.counting import Flops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Extent = Literal["smoke", "usual", "full"]
PACKAGES = ("torch", "triton", "transformers", "pytest-benchmark", "captum", "foolbox", "torchattacks")


def device_of(config: pytest.Config) -> torch.device:
    """What to measure on."""
    chosen = config.getoption("--device", default=None) or os.environ.get("ADVVL_BENCH_DEVICE")
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))


def extent_of(config: pytest.Config) -> Extent:
    """How much to measure."""
    chosen = [extent for extent in get_args(Extent) if config.getoption(f"--{extent}", default=False)]
    return chosen[0] if chosen else "usual"


def facts(device: torch.device) -> dict[str, Any]:
    """Where and with what a figure was taken."""
    return {
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of what torch's registry has a formula for: matrix products, convolutions, attention."""
    with Flops() as counted:
        work()
    return counted.total


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made by `work` held at one time: from the allocator on a GPU, else counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with LiveBytes() as live:
        work()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, from then until nothing holds it.

    The same at every run, which the resident size of a process is not; what an operation needs inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), given)
        return out

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage in self._known or id(storage) in given:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that one call puts on the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that is measured, with a plus if files have changed since; ADVVL_BENCH_COMMIT where there is no git."""
    if "ADVVL_BENCH_COMMIT" in os.environ:
        return os.environ["ADVVL_BENCH_COMMIT"]
    root = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../advvl"], cwd=root, capture_output=True)
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.returncode else "") if commit.returncode == 0 else "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
