"""torch's fast path through its own attention layers, switched off while tensors inside them are read or changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_LOCK = threading.Lock()
_OFF = [0]  # the number of contexts that keep it off, in all threads
_BEFORE = [True]


def has_fast_path(model: nn.Module) -> bool:
    """True if a model holds layers of torch that may fuse, and nest their tensors, in eval mode without gradients."""
    return any(isinstance(module, _FUSED) for module in model.modules())


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Run torch's transformer layers without the fast path."""
    with _LOCK:
        if _OFF[0] == 0:
            _BEFORE[0] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _OFF[0] += 1
    try:
        yield
    finally:
        with _LOCK:
            _OFF[0] -= 1
            if _OFF[0] == 0:
                torch.backends.mha.set_fastpath_enabled(_BEFORE[0])


_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
