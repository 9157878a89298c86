"""Rows that are cut into blocks are read twice: how much of the second read comes from the cache.

If none does, an update moves four tensors where three would do without a ball, five with an L2 ball: 75 % and 60 % of a
copy's speed. A perturbation that fits the chip's cache should be well above, one that does not shows what is reused.
"""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.sections.moves import Tensors, device_times
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

BOUNDS = {False: 0.75, True: 0.60}
SHAPES = [(8, 131_072), (64, 131_072), (512, 131_072), (64, 73_728), (8, 8_388_608)]
SMOKE_SHAPES = [(2, 16_400)]


def run(setting: Setting) -> None:
    for rows, size in SMOKE_SHAPES if setting.smoke else SHAPES:
        for ball, bound in BOUNDS.items():
            case = f"{rows}x{size}, {'L2 ball' if ball else 'no ball'}, float32"
            setting.measure(case, partial(_case, setting, case, rows, size, ball, bound))


def _case(setting: Setting, case: str, rows: int, size: int, ball: bool, bound: float) -> None:
    tensors = Tensors.of(setting, rows, size, ball=ball)
    times = device_times(
        setting, {"copy": tensors.copy(), "ours": tensors.ours(backend="triton")}, Pace(budget=1.0, most=60)
    )
    setting.ratio(
        case, "speed over that of a copy of the same bytes", times, of="copy", over="ours",
        goal=f"above {bound}: the second read is partly cached", least=bound,
        note=f"{tensors.delta.nbytes / 2**20:.0f} MiB a tensor", bound=bound,
    )  # fmt: skip
