"""Counts what a piece of work does: floating-point operations, and reads that make the host wait for a device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Every operation that torch's registry has a formula for: matrix products, convolutions, attention.

    As torch's own counter, but by no hooks on modules, which `autograd.grad` towards a leaf does not bear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(getattr(func, "_overloadpacket", func))) is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class HostReads(TorchDispatchMode):
    """Reads of a number, and shapes that depend on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket.__name__ in self.WAITS
        return func(*args, **(kwargs or {}))
