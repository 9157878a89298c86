"""Three comparisons: the same bits, equal but for rounding, and gradients equal relative to their largest entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Relative tolerance by the dtype that a computation is stored in; it depends on nothing else.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(found: Any, expected: Any, *, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    """Float64 tensors, or mappings and sequences of them, are equal but for rounding."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def close_gradients(found: Any, expected: Any, dtype: torch.dtype | None = None) -> None:
    """Tensors by name, or a list of such (one per update), are equal but for rounding.

    Rounding is relative to a tensor's largest entry, or to a thousandth of the largest entry of all; `dtype` is the
    precision of the computation where it is not that of the expected tensors.
    """
    if not isinstance(expected, Mapping):
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            close_gradients(ours, theirs, dtype)
        return
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=TOLERANCE[dtype or value.dtype] * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def same(found: Any, expected: Any) -> None:
    """The same bits, shapes, types and names, through mappings, sequences and dataclasses."""
    assert differences(found, expected) == []


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """The paths at which two values are not the same."""
    if isinstance(expected, Tensor):
        return [] if isinstance(found, Tensor) and _bits(found) == _bits(expected) else [where]
    if is_dataclass(expected) and not isinstance(expected, type):
        found, expected = ({f.name: getattr(one, f.name) for f in fields(one)} for one in (found, expected))
    if isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return [f"{where}: names {sorted(map(str, found.keys() ^ expected.keys()))}"]
        return [path for name in expected for path in differences(found[name], expected[name], f"{where}.{name}")]
    if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} and {len(expected)} entries"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [path for n, (one, other) in pairs for path in differences(one, other, f"{where}[{n}]")]
    return [] if found == expected else [where]


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    data = tensor.detach().cpu().contiguous().flatten()
    return tensor.dtype, tensor.shape, data.view(torch.uint8).numpy().tobytes()
