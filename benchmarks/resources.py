"""What the compiler makes of the Triton kernels for an H100 or H200, which need not be there.

`python benchmarks/resources.py` prints it as a table in Markdown.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.compiled import KERNELS, Compiled, Launch
from tables import table
from test_ops import PIXELS, TOKENS

from advvl.ops import Move, Region, Rows, _triton

REGISTERS, THREADS, PROGRAMS = 65_536, 2_048, 32  # of one multiprocessor


def resident(registers: int, warps: int) -> int:
    """Programs that one multiprocessor runs at a time; the kernels take next to no shared memory."""
    threads = 32 * warps
    return min(THREADS // threads, REGISTERS // (-(-registers // 8) * 8 * threads), PROGRAMS)


def launches(shape: tuple[int, ...], dtype: torch.dtype, radius: float, masked: bool) -> list[Launch]:
    """Those of one step, in order."""
    found: list[Launch] = []
    kernels = {name: getattr(_triton, name) for name in KERNELS}
    try:
        for name, kernel in kernels.items():
            setattr(_triton, name, Compiled(kernel, found))
        delta, grad = (torch.zeros(shape, dtype=dtype) for _ in range(2))
        rows = Rows(mask=torch.ones(shape[:2], dtype=torch.bool) if masked else None)
        _triton.move(
            [Move(delta=delta, grad=grad, step_size=0.1, rows=rows, region=Region(radius=radius))], inplace=True
        )
    finally:
        for name, kernel in kernels.items():
            setattr(_triton, name, kernel)
    return found


def main() -> None:
    lines = []
    for shape in [*TOKENS, PIXELS]:
        for radius, region in ((math.inf, "no ball"), (1.0, "L2 ball")):
            for masked in (False, True):
                both = zip(*(launches(shape, t, radius, masked) for t in (torch.float32, torch.bfloat16)), strict=True)
                for pair in both:
                    used = [launch.resources() for launch in pair]
                    at_once = [resident(use["reg"], launch.warps) for use, launch in zip(used, pair, strict=True)]
                    lines.append(
                        [
                            "x".join(map(str, shape)),
                            region + ", masked" * masked,
                            pair[0].name.removesuffix("_kernel"),
                            f"{pair[0].programs} x {pair[0].warps}",
                            *(" / ".join(str(use[key]) for use in used) for key in ("reg", "stack")),
                            " / ".join(map(str, at_once)),
                        ]
                    )
    heads = ["shape", "region", "kernel", "programs x warps", "registers", "stack, bytes", "programs a multiprocessor"]
    print(table(heads, lines))


if __name__ == "__main__":
    main()
