"""Values that the host can look at without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """True for a tensor on the CPU, outside compiled code, which would be cut in two by a look at a value."""
    return tensor.is_cpu and not torch.compiler.is_compiling()
