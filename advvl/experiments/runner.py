"""What every experiment stands on: devices, threads, and training that resumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.errors import ConfigurationError
from advvl.fit.loop import BatchSource, fit


@contextmanager
def reproducible(*, threads: int) -> Iterator[None]:
    """Within, equal computations give equal bits: a fixed number of threads, and deterministic algorithms on CUDA."""
    variable, value = "CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    count, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault(variable, ":4096:8")  # what cuBLAS wants for it; it is read when CUDA is first used
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(torch.cuda.is_available())  # on the CPU they are so, and this would cost time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.set_num_threads(count)
        if value is None:
            del os.environ[variable]


def accelerator_on(device: str) -> Accelerator:
    """An accelerator on that device; "auto" is CUDA if there is one, else the CPU.

    Errors: `ConfigurationError` for a device that torch does not know or this machine does not have.
    """
    chosen = device_of(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return Accelerator(cpu=chosen.type == "cpu")


def device_of(device: str) -> torch.device:
    """The device of that name; errors: see `accelerator_on`."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = {"auto": found[min(1, len(found) - 1)], **({"cuda": "cuda:0"} if len(found) > 1 else {})}
    name = names.get(device, device)
    if name not in found:
        raise ConfigurationError(
            f"expected a device of this machine, {', '.join(['auto', *found])}, got {device!r}; change --device"
        )
    return torch.device(name)


def train(
    model: nn.Module, source: BatchSource, *, accelerator: Accelerator, progress: bool, worker: int, **arguments: Any
) -> dict[str, Any]:
    """Fit a model, taking up what a killed run left; say how it went, and return that for the record."""
    result = fit(model, source, accelerator=accelerator, resume=True, progress=progress, line=worker, **arguments)
    tqdm.write(
        f"{arguments['description']}: {result.updates} updates of {1000 * result.seconds_per_update:.1f} ms, "
        f"last loss {result.losses[-1]:.3f}"
    )
    tail = result.losses[-max(1, len(result.losses) // 20) :]
    return {
        "updates": result.updates,
        "seconds": result.seconds,
        "seconds_per_update": result.seconds_per_update,
        "loss": sum(tail) / len(tail),
    }
