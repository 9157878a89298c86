"""Packed rows, several to a sample, under deterministic algorithms: the same bits twice, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from advvl.ops import step_and_project
from benchmarks.gpu.sections.moves import Tensors, device_times
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

SHAPES = [(16_384, 1_280, 32), (65_536, 3_584, 64)]  # rows, width, samples: image tokens of a Qwen-VL
SMOKE_SHAPES = [(24, 40, 3)]


def run(setting: Setting) -> None:
    for rows, width, samples in SMOKE_SHAPES if setting.smoke else SHAPES:
        for norm in ("l2", "linf"):
            case = f"{rows} rows of {width} in {samples} samples, {norm}, float32"
            setting.measure(case, partial(_case, setting, case, rows, width, samples, norm))


def _case(setting: Setting, case: str, rows: int, width: int, samples: int, norm: str) -> None:
    tensors = Tensors.of(setting, rows, width)
    segments = torch.randint(samples, (rows,), device=setting.device).sort().values
    options: dict[str, Any] = tensors.options | {"norm": norm, "segments": segments}

    def once() -> torch.Tensor:
        return step_and_project(tensors.delta, tensors.grad, **options).delta

    with deterministic():
        first, second = once(), once()
    same = torch.equal(first, second)
    setting.add(setting.row(case, "the same bits twice", value=float(same), goal="1", reached=same))
    delta = tensors.delta.clone()

    def call() -> None:
        step_and_project(delta, tensors.grad, **options, inplace=True)

    def call_deterministically() -> None:
        with deterministic():
            call()

    calls = {"copy": tensors.copy(), "ours": call, "ours, deterministic": call_deterministically}
    for each in calls.values():
        each()
    times = device_times(setting, calls, Pace(budget=1.0))
    measure = "speed over that of a copy of the same bytes"
    setting.ratio(case, measure, times, of="copy", over="ours")
    setting.ratio(case, "time over that without deterministic algorithms", times, of="ours, deterministic", over="ours")


@contextmanager
def deterministic() -> Iterator[None]:
    """As a user asks for it, without the filling of new memory, which is for finding faults."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
