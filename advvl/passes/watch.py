"""Checks of a backward that is not the last of a step, during which parameters must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from advvl.errors import ConfigurationError, more


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Refuse a backward inside this context that changes a parameter; reads from the device.

    Raises:
        ConfigurationError: one was changed, in place or, as some optimisers do, behind autograd's back by `.data`.
    """
    before = [(name, p, p._version, _size(p)) for name, p in model.named_parameters() if p.requires_grad]
    yield
    written = [name for name, parameter, version, _ in before if parameter._version != version]
    if not written:
        sizes = [(name, size, _size(parameter)) for name, parameter, _, size in before]
        found = [(name, old, new) for name, old, new in sizes if old is not None and new is not None]
        if found:
            moved = torch.stack([(old != new) & old.isfinite() for _, old, new in found])
            written = [name for (name, _, _), flag in zip(found, moved.tolist(), strict=True) if flag]
    if written:
        raise ConfigurationError(
            f"expected updates after a step's last backward, got {written[0]!r} updated before; "
            f"take the optimiser out of hooks{more('updates-in-backward')}"
        )


def _size(parameter: Tensor) -> Tensor | None:
    """The L2 norm of a parameter, or of this process's shard; None where its values are not in memory."""
    value = parameter.detach()
    value = value.to_local() if hasattr(value, "to_local") else value
    if value.is_meta or not value.numel() or not value.untyped_storage().size() or not value.is_floating_point():
        return None
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    size: Tensor = torch.linalg.vector_norm(value, dtype=wide)
    return size.cpu()
