"""Leaving a model as found: its modes, and its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Every module is back in training or eval mode as it was, at the end."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Every buffer is the tensor that it was and holds what it held, at the end, also where a forward replaces it."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            # By `data`, which counts as no change: a graph that is alive may have saved a buffer for its backward.
            buffer.data.copy_(value)
            setattr(module, name, buffer)
