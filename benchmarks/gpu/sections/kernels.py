"""The kernels on rows of 8k, 12k and 16k entries, which one program holds, and beyond, against a copy of the same bytes."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.sections.moves import Tensors, device_times, name_of
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

SIZES = (8_192, 12_288, 16_384, 32_768, 131_072, 1_048_576)
ENTRIES = 2**26  # of the whole perturbation: 256 MiB in fp32, well beyond any cache
SMOKE_SIZES, SMOKE_ROWS = (33, 16_400), 2  # the longer one is cut into blocks


def run(setting: Setting) -> None:
    for size in SMOKE_SIZES if setting.smoke else SIZES:
        for ball in (False, True):
            for dtype in (torch.float32,) if setting.smoke else (torch.float32, torch.bfloat16):
                rows = SMOKE_ROWS if setting.smoke else ENTRIES // size
                case = f"{rows}x{size}, {'L2 ball' if ball else 'no ball'}, {name_of(dtype)}"
                setting.measure(case, partial(_case, setting, case, rows, size, dtype, ball))


def _case(setting: Setting, case: str, rows: int, size: int, dtype: torch.dtype, ball: bool) -> None:
    tensors = Tensors.of(setting, rows, size, dtype, ball=ball)
    calls = {"copy": tensors.copy(), "ours": tensors.ours(backend="triton"), "published": tensors.published()}
    times = device_times(setting, calls, Pace(budget=1.0))
    gigabytes = tensors.nbytes / 1e9 / min(times["ours"])
    note = f"{gigabytes:.0f} GB/s at best"
    setting.ratio(
        case, "speed over that of a copy of the same bytes", times, of="copy", over="ours",
        goal="at least 0.85", least=0.85, note=note,
    )  # fmt: skip
    setting.ratio(case, "speed over the published update's", times, of="published", over="ours")
