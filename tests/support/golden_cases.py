"""Reads the golden tensors: numbers that the published code gave in float64 on tiny random models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("ADVVL_GOLDEN") or Path(__file__).parents[1] / "golden")


def folder(name: str) -> Path:
    path = ROOT / name
    if not path.is_dir() or not any(path.iterdir()):
        raise FileNotFoundError(f"expected golden tensors in {path}, got none; see tests/golden/README.md")
    return path


def tensors(name: str, file: str) -> dict[str, Tensor]:
    """The tensors of one file; masks, stored as uint8, come as bool."""
    loaded = load_file(folder(name) / f"{file}.safetensors")
    return {key: value.bool() if value.dtype == torch.uint8 else value for key, value in loaded.items()}


def batch(name: str, file: str = "batch") -> dict[str, Tensor]:
    return {key.removeprefix("batch."): value for key, value in tensors(name, file).items()}


def document(name: str, file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder(name) / f"{file}.json").read_text())
    return loaded


def kind(name: str) -> str:
    """What a tensor is, across steps and parameters: `step2.text_grad` is a `text_grad`, `grad.a.b` a `grad`."""
    first, _, rest = name.partition(".")
    return rest if first.startswith("step") else first if first == "grad" else name


def disagreements(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Every tensor by which two cases differ: max|a−b| > 1e-9·max(max|b|, 1e-3·the largest entry of its kind)."""
    largest: dict[str, float] = {}
    for name, value in expected.items():
        largest[kind(name)] = max(largest.get(kind(name), 0.0), float(value.abs().max()))
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        a, b = found[name], expected[name]
        if a.shape != b.shape:
            problems.append(f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
            continue
        error, bound = float((a - b).abs().max()), 1e-9 * max(float(b.abs().max()), 1e-3 * largest[kind(name)])
        if not error <= bound:
            problems.append(f"{name}: off by {error:.3g}, bound {bound:.3g}")
    return sorted(problems)
