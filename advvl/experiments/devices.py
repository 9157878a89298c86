"""Devices by name, and computations that give the same bits each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from advvl.checks import shown
from advvl.errors import ConfigurationError


@contextmanager
def reproducible(*, threads: int) -> Iterator[None]:
    """Within, equal computations give equal bits: a fixed number of threads, and deterministic algorithms on CUDA."""
    variable, value = "CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    count, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault(variable, ":4096:8")  # cuBLAS needs it for that, and reads it when CUDA is first used
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(torch.cuda.is_available())  # a CPU's are, and this would slow them down
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.set_num_threads(count)
        if value is None:
            del os.environ[variable]


def accelerator_on(device: str) -> Accelerator:
    """Return an accelerator on the device of that name, as `device_of` takes it.

    Raises:
        ConfigurationError: see `device_of`.
    """
    chosen = device_of(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return Accelerator(cpu=chosen.type == "cpu")


def device_of(device: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if there is one, else the CPU.

    Raises:
        ConfigurationError: a device that torch does not know or this machine does not have.
    """
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = {"auto": found[min(1, len(found) - 1)], **({"cuda": "cuda:0"} if len(found) > 1 else {})}
    name = names.get(device, device) if isinstance(device, str) else None
    if name not in found:
        raise ConfigurationError(
            f"expected a device of this machine, {', '.join(['auto', *found])}, got {shown(device)}; change --device"
        )
    return torch.device(name)
