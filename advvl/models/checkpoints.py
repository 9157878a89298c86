"""UNITER's checkpoints: read under any of the names in use, checked in full, and written back under the official ones.

Names in use: `uniter.*` and `bert.*` for the encoder, or neither (saved bare); `gamma` and `beta` of old BERTs;
`module.` of wrappers. The official names (`uniter.*`, `cls.*`, …) are those of the models here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from advvl.errors import CheckpointError, ConfigurationError
from advvl.storage import read_torch, write_safetensors, write_torch

PRETRAINING_HEADS: Final = ("cls.*", "feat_regress.*", "region_classifier.*", "itm_output.*")

_WRAPPERS = ("module", "_orig_mod")
_ENCODER_PARTS = ("embeddings", "img_embeddings", "encoder", "pooler")
_BUFFERS = ("position_ids", "token_type_ids")
_VOCABULARY = ("uniter.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias")
_MOST_PADDING = 64  # more rows than any alignment adds are another vocabulary, unless they are zero
_SHOWN = 8


@dataclass(frozen=True)
class LoadReport:
    """What was allowed to differ, in official names: left as it was in the model, left out of the file."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> LoadReport:
    """Read a `.safetensors` or PyTorch file into a model, all of it or nothing; no code in the file is run.

    Rows of a vocabulary padded for alignment are left out. Weights that the model ties may be in the file once, or
    several times if they agree.

    Arguments:
        model: a UNITER, bare or with a task's head.
        allow_missing, allow_unexpected: names that the file may lack or have beside: `"vqa_output.*"`, or `"cls"` for
            everything in it.

    Example:
        load_checkpoint(model, "uniter-base.pt", allow_missing=["vqa_output"], allow_unexpected=PRETRAINING_HEADS)

    Raises:
        CheckpointError: a file that is missing, truncated, or more than tensors; one that does not fit the model. The
            model is then as it was.
    """
    for patterns in (allow_missing, allow_unexpected):
        if isinstance(patterns, str):
            raise ConfigurationError(f"expected a sequence of patterns, got the text {patterns!r}; put it in a list")
    problems: list[str] = []
    found = _renamed(_read(path), problems)
    tied: dict[int, list[str]] = {}
    expected = {official_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    for name, value in expected.items():
        tied.setdefault(id(value), []).append(name)

    missing, chosen = [], {}
    for names in tied.values():
        present = {name: _unpadded(name, found[name], expected[name]) for name in names if name in found}
        problems += _misfits(present, expected)
        if present:
            chosen[names[0]] = next(iter(present.values()))
        else:
            missing.append(names)
    lacking = [", ".join(names) for names in missing if not any(_matches(name, allow_missing) for name in names)]
    beside = [name for name in found if name not in expected and not _matches(name, allow_unexpected)]
    problems += [f"missing {name}" for name in lacking] + [f"unexpected {name}" for name in beside]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"expected a checkpoint of {type(model).__name__} at {str(path)!r}, got one that does not fit: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Give the model the checkpoint's sizes, or name in allow_missing "
            "and allow_unexpected what may differ"
        )
    with torch.no_grad():
        for name, value in chosen.items():
            expected[name].copy_(value)
    return LoadReport(
        tuple(name for names in missing for name in names), tuple(name for name in found if name not in expected)
    )


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's tensors under their official names, whole or not at all: safetensors, or PyTorch's `.pt`.

    Raises:
        ConfigurationError: another suffix.
    """
    state: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in model.state_dict().items():
        address = value.data_ptr()
        state[official_name(name)] = value.clone() if address in written else value  # safetensors shares no memory
        written.add(address)
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        return write_safetensors(path, state)
    if suffix in (".pt", ".pth", ".bin"):
        return write_torch(path, {name: value.detach().cpu() for name, value in state.items()})
    raise ConfigurationError(f"expected a file ending in .safetensors, .pt, .pth or .bin, got {str(path)!r}")


def official_name(name: str) -> str:
    """The official name of a tensor that goes under any of the names in use."""
    parts = name.split(".")
    while parts[0] in _WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    if parts[0] == "bert":
        parts[0] = "uniter"
    elif parts[0] in _ENCODER_PARTS:
        parts.insert(0, "uniter")
    parts[-1] = {"gamma": "weight", "beta": "bias"}.get(parts[-1], parts[-1])
    official = ".".join(parts)
    return "cls.predictions.bias" if official == "cls.predictions.decoder.bias" else official


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    if Path(path).suffix != ".safetensors":
        return _tensors(read_torch(path), path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"expected a whole safetensors file at {str(path)!r}, got {error}; check the path, or fetch it anew"
        ) from error


def _tensors(value: Any, path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"expected names and tensors in {str(path)!r}, got a {type(value).__name__}; save the state dict alone"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"expected names and tensors in {str(path)!r}, got a {type(tensor).__name__} at {name!r}; "
                "save the state dict alone"
            )
    return value


def _renamed(found: Mapping[str, Tensor], problems: list[str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in found.items():
        official = official_name(name)
        if official.rpartition(".")[2] in _BUFFERS:
            continue
        if official in renamed and not _agree(renamed[official], value):
            problems.append(f"{name} differs from another tensor that is also called {official}")
        renamed.setdefault(official, value)
    return renamed


def _unpadded(name: str, value: Tensor, expected: Tensor) -> Tensor:
    if name not in _VOCABULARY or value.ndim != expected.ndim or value.shape[1:] != expected.shape[1:]:
        return value
    padding = value[expected.shape[0] :]
    return value[: expected.shape[0]] if len(padding) < _MOST_PADDING or not padding.any() else value


def _misfits(present: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterable[str]:
    """What is wrong with the tensors that the file has for one parameter."""
    first = next(iter(present), "")
    for name, value in present.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            yield f"{name}: expected shape {tuple(wanted.shape)}, found {tuple(value.shape)}"
        elif value.is_floating_point() != wanted.is_floating_point():
            yield f"{name}: expected {wanted.dtype}, found {value.dtype}"
        elif wanted.is_meta:
            yield f"{name}: expected a model with memory to load into, found one on the meta device"
        elif not _agree(value, present[first]):
            yield f"{name} and {first}: expected one tied tensor, found two that differ"


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    for pattern in patterns:
        of_encoder = pattern.split(".")[0] in ("bert", *_ENCODER_PARTS)
        for spelling in (pattern, official_name(pattern) if of_encoder else pattern):
            if fnmatchcase(name, spelling) or name.startswith(f"{spelling.rstrip('.')}."):
                return True
    return False
