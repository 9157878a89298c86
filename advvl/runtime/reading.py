"""Values that the host can read without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """True for a tensor on the CPU outside compiled code, where reading a value would break the graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling()
