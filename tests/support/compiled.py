"""Compiles the kernels' launches for a GPU that need not be there, and runs none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

KERNELS = ("rows_kernel", "sums_kernel", "verdict_kernel", "apply_kernel", "norms_kernel")
HOPPER = 90
_KINDS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "uint8": "u8"}


@dataclass(frozen=True)
class Launch:
    """One launch, compiled.

    Arguments:
        name: of the kernel.
        programs, warps: of the launch.
        binary: triton's compiled kernel.
    """

    name: str
    programs: int
    warps: int
    binary: Any

    def resources(self) -> dict[str, int]:
        """Registers a thread, bytes of stack (where registers are spilled to) and of shared memory a program."""
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", said)}


class Compiled:
    """In a kernel's place; notes every launch in `launches`."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, num_warps: int, enable_fp_fusion: bool, **constants: object) -> None:
            import triton
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource

            signature, known, hints = dict[str, str](), dict[tuple[int, ...], object](), dict[tuple[int, ...], object]()
            names = self.kernel.arg_names
            for index, (name, value) in enumerate({**dict(zip(names, args, strict=False)), **constants}.items()):
                if isinstance(value, Tensor):
                    signature[name] = "*" + _KINDS[str(value.dtype).removeprefix("torch.")]
                    hints[index,] = [["tt.divisibility", 16]]  # what the launcher finds of torch's memory
                elif isinstance(value, float):
                    signature[name] = self.kernel.params[index].annotation_type or "fp32"
                elif name in constants or value is None or value == 1:
                    signature[name], known[index,] = "constexpr", value
                else:
                    signature[name] = "i32"
                    if value % 16 == 0:  # type: ignore[operator]
                        hints[index,] = [["tt.divisibility", 16]]
            assert list(signature) == list(names)
            source = ASTSource(fn=self.kernel, signature=signature, constexprs=known, attrs=hints)
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            binary = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
            self.launches.append(Launch(self.kernel.__name__, grid[0], num_warps, binary))

        return launch
