"""Models' tensors in files: read under any known name, checked in full, written atomically; no code is run.

A file's tensors are checked before anything is compared, copied or printed: a file of a kilobyte can hold a tensor that
claims terabytes.

A kind of model names its tensors by a `Naming`: UNITER's and LXMERT's are in the `checkpoint` files of their folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from advvl.checks import path_of, shown
from advvl.errors import CheckpointError, ConfigurationError, more
from advvl.files import read_torch, write_safetensors, write_torch
from advvl.runtime.names import without_wrappers

_BUFFERS = ("position_ids", "token_type_ids")
_MOST_PADDING = 64  # more rows than any alignment adds are another vocabulary, unless they are zero
_SHOWN = 8
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)


@dataclass(frozen=True)
class Naming:
    """The names that checkpoints of one kind of model give its tensors.

    Arguments:
        common: from any name in use, in a file or a model, to the name by which they are compared.
        vocabulary: the common names of tensors with a row per word, which a file may pad for alignment.
    """

    common: Callable[[str], str]
    vocabulary: frozenset[str]


@dataclass(frozen=True)
class LoadReport:
    """The tensors that were allowed to differ, in common names: left as they were in the model, left out of the file."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def plain_parts(name: str) -> list[str]:
    """The parts of a name without wrappers' prefixes, the last part in its current spelling: no `gamma`, no `beta`."""
    *parts, last = name.split(".")
    return [*without_wrappers(parts), {"gamma": "weight", "beta": "bias"}.get(last, last)]


def read_state(path: str | os.PathLike[str], *, under: str | None = None) -> Mapping[str, Tensor]:
    """The named tensors of a `.safetensors` or PyTorch file, on the CPU.

    Arguments:
        under: the entry of a PyTorch file that holds the tensors, if it has that entry; other entries are ignored.

    Raises:
        CheckpointError: a file that is missing, truncated, or more than tensors; a tensor that is not dense, or larger
            than what is stored of it.
    """
    path = path_of(path)
    if path.suffix != ".safetensors":
        value = read_torch(path)
        return _tensors(
            value[under] if under is not None and isinstance(value, dict) and under in value else value, path
        )
    try:
        return _tensors(load_file(path), path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"expected a whole safetensors file at {str(path)!r}, got {error}; check the path, or fetch it again"
        ) from error


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    naming: Naming,
    *,
    source: str | os.PathLike[str],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> LoadReport:
    """Copy tensors into a model, all of them or none, tied ones once, vocabularies without their padding.

    Arguments:
        source: where the tensors come from, for the message.
        allow_missing, allow_unexpected: names in any spelling, with wildcards, or a whole prefix.

    Raises:
        CheckpointError: tensors that do not fit; the model is then as it was.
    """
    for patterns in (allow_missing, allow_unexpected):
        if isinstance(patterns, str):
            raise ConfigurationError(f"expected a sequence of patterns, got the text {patterns!r}; put it in a list")
    problems: list[str] = []
    found = _renamed(state, naming, problems)
    tied: dict[int, list[str]] = {}
    expected = {naming.common(name): value for name, value in model.state_dict(keep_vars=True).items()}
    for name, value in expected.items():
        tied.setdefault(id(value), []).append(name)

    missing, chosen = [], {}
    for names in tied.values():
        present = {name: _unpadded(name, found[name], expected[name], naming) for name in names if name in found}
        problems += _misfits(present, expected)
        if present:
            chosen[names[0]] = next(iter(present.values()))
        else:
            missing.append(names)
    lacking = [", ".join(names) for names in missing if not any(_matches(n, allow_missing, naming) for n in names)]
    beside = [name for name in found if name not in expected and not _matches(name, allow_unexpected, naming)]
    problems += [f"missing {name}" for name in lacking] + [f"unexpected {name}" for name in beside]
    if problems and found and not chosen:
        raise CheckpointError(
            f"expected a checkpoint of {type(model).__name__} at {str(source)!r}, got one that has none of its names, "
            f"but {', '.join(list(found)[:3])}, …; see which of advvl.models reads it"
        )
    if problems:
        others = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"expected a checkpoint of {type(model).__name__} at {str(source)!r}, got one that does not fit: "
            f"{'; '.join(problems[:_SHOWN])}{others}{more('checkpoint-that-does-not-fit')}"
        )
    with torch.no_grad():
        for name, value in chosen.items():
            expected[name].copy_(value)
    return LoadReport(
        tuple(name for names in missing for name in names), tuple(name for name in found if name not in expected)
    )


def write_state(model: nn.Module, path: str | os.PathLike[str], written_name: Callable[[str], str]) -> Path:
    """Write a model's tensors, whole or not at all: safetensors, or PyTorch's `.pt`.

    Arguments:
        written_name: from the model's own name of a tensor to its name in the file.

    Raises:
        ConfigurationError: another suffix.
    """
    state: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in model.state_dict().items():
        address = value.data_ptr()
        state[written_name(name)] = value.clone() if address in written else value  # safetensors shares no memory
        written.add(address)
    suffix = path_of(path).suffix
    if suffix == ".safetensors":
        return write_safetensors(path, state)
    if suffix in (".pt", ".pth", ".bin"):
        return write_torch(path, {name: value.detach().cpu() for name, value in state.items()})
    raise ConfigurationError(f"expected a file ending in .safetensors, .pt, .pth or .bin, got {str(path)!r}")


def _tensors(value: Any, path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"expected names and tensors in {str(path)!r}, got a {type(value).__name__}; save the state dict alone"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"expected names and tensors in {str(path)!r}, got a {type(tensor).__name__} at {shown(name)}; "
                "save the state dict alone"
            )
        if fault := _unusable(tensor):
            raise CheckpointError(
                f"expected dense tensors of plain numbers in {str(path)!r}, got {shown(name)} {fault}; "
                "save the state dict of the model in memory"
            )
    return value


def _unusable(tensor: Tensor) -> str:
    """Return the reason why a tensor can be neither compared nor copied, judged without reading it; empty: it can."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"of layout {tensor.layout}"
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.dtype not in _DTYPES:
        return f"of {tensor.dtype}"
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        return f"of shape {tuple(tensor.shape)} over {stored} bytes"
    return ""


def _renamed(found: Mapping[str, Tensor], naming: Naming, problems: list[str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in found.items():
        common = naming.common(name)
        if common.rpartition(".")[2] in _BUFFERS:
            continue
        if common in renamed and not _agree(renamed[common], value):
            problems.append(f"{name} differs from another tensor that is also called {common}")
        renamed.setdefault(common, value)
    return renamed


def _unpadded(name: str, value: Tensor, expected: Tensor, naming: Naming) -> Tensor:
    if name not in naming.vocabulary or value.ndim != expected.ndim or value.shape[1:] != expected.shape[1:]:
        return value
    padding = value[expected.shape[0] :]
    return value[: expected.shape[0]] if len(padding) < _MOST_PADDING or not padding.any() else value


def _misfits(present: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield the faults of the tensors that the file has for one parameter."""
    first = next(iter(present), "")
    for name, value in present.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            yield f"{name}: expected shape {tuple(wanted.shape)}, found {tuple(value.shape)}"
        elif value.is_floating_point() != wanted.is_floating_point():
            yield f"{name}: expected {wanted.dtype}, found {value.dtype}"
        elif wanted.is_meta:
            yield f"{name}: expected a model with memory to load into, found one on the meta device"
        elif not (finite := value.isfinite()).all():
            yield f"{name}: expected finite numbers, found {int((~finite).sum())} of {value.numel()} that are not"
        elif not _agree(value, present[first]):
            yield f"{name} and {first}: expected one tied tensor, found two that differ"


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _matches(name: str, patterns: Iterable[str], naming: Naming) -> bool:
    for pattern in patterns:
        # without its wrapper, only module.* would remain
        parts = pattern.split(".")
        common = naming.common(pattern) if without_wrappers(parts)[:1] == parts[:1] else pattern
        if any(fnmatchcase(name, p) or name.startswith(f"{p.rstrip('.')}.") for p in (pattern, common)):
            return True
    return False
