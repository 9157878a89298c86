"""Perturbations of more than 2^31 entries: the reference's update at both ends, and the speed against a copy's."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.sections.moves import Tensors, device_times
from benchmarks.gpu.setting import Setting, Skipped
from benchmarks.gpu.timing import Pace

SHAPES = [(2**18 + 8, 2**13), (2**14 + 8, 2**17)]  # rows in one program, and cut into blocks
SMOKE_SHAPES = [(4, 64)]
TENSORS = 6  # of the perturbation's size are held at once, about


def run(setting: Setting) -> None:
    for rows, size in SMOKE_SHAPES if setting.smoke else SHAPES:
        case = f"{rows}x{size}, L2 ball, bfloat16"
        setting.measure(case, partial(_case, setting, case, rows, size))


def _case(setting: Setting, case: str, rows: int, size: int) -> None:
    needed = TENSORS * 2 * rows * size
    if setting.free_bytes() < needed:
        raise Skipped(f"needs {needed / 2**30:.0f} GiB of free memory, {setting.free_bytes() / 2**30:.0f} there")
    tensors = Tensors.of(setting, rows, size, torch.bfloat16)
    calls = {"copy": tensors.copy(), "ours": tensors.ours(backend="triton")}  # holds the ends to the reference
    times = device_times(setting, calls, Pace(budget=1.0, least=3))
    setting.ratio(
        case, "speed over that of a copy of the same bytes", times, of="copy", over="ours",
        goal="at least 0.6", least=0.6, note="both ends are the reference's",
    )  # fmt: skip
