"""UNITER's checkpoints: read under any of the names in use, and written under the official ones.

A file of a task's own model is read by `load_checkpoint`; a file of pre-training starts a task by `load_pretrained`.

Names in use: `uniter.*` and `bert.*` for the encoder, or neither (saved bare); `gamma` and `beta` of old BERTs;
`module.` of wrappers. The official names (`uniter.*`, `cls.*`, …) are those of the models here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torch import nn

from advvl.errors import ConfigurationError
from advvl.models.state_files import LoadReport, Naming, load_state, plain_parts, read_state, write_state
from advvl.models.uniter.task import WORDS, UniterTask

PRETRAINING_HEADS: Final = ("cls.*", "feat_regress.*", "region_classifier.*", "itm_output.*")

_PRETRAINED_PARTS = tuple(pattern.removesuffix("*") for pattern in PRETRAINING_HEADS)
_ENCODER_PARTS = ("embeddings", "img_embeddings", "encoder", "pooler")


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
        allow_missing, allow_unexpected: names that the file may lack or have in addition: `"vqa_output.*"`, or `"cls"`
            for everything in it.

    Example:
        load_checkpoint(model, "uniter-base.pt", allow_missing=["vqa_output"], allow_unexpected=PRETRAINING_HEADS)

    Raises:
        CheckpointError: a file that is missing, truncated, or more than tensors; one that does not fit the model. The
            model is then as it was.
    """
    return load_state(
        model,
        read_state(path),
        _NAMING,
        source=path,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )


def load_pretrained(model: UniterTask, path: str | os.PathLike[str]) -> LoadReport:
    """Start a task's model from a pre-training checkpoint of either stage, all of it or nothing; no code in it is run.

    The whole encoder must be there. The task's head stays as drawn if the file has none, and heads of pre-training that
    the model does not have are left out. Types and words that the task adds start as `UniterTask` says, unless the file
    has them, as one of VCR's second stage has.

    Example:
        model = UniterForNLVR2(UniterConfig.base())
        load_pretrained(model, "uniter-base.pt")

    Raises:
        CheckpointError: as `load_checkpoint`; the model is then as it was.
        ConfigurationError: a model of no task.
    """
    if not isinstance(model, UniterTask):
        raise ConfigurationError(
            f"expected a UNITER with a task's head, got {type(model).__name__}; load_checkpoint reads into any other"
        )
    found = read_state(path)
    state = {name: model.grown(official_name(name), value) for name, value in found.items()}
    state |= model.derived({official_name(name): value for name, value in found.items()})
    heads = [name for name in model.state_dict() if not name.startswith(("uniter.", *_PRETRAINED_PARTS))]
    return load_state(model, state, _NAMING, source=path, allow_missing=heads, allow_unexpected=PRETRAINING_HEADS)


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's tensors under their official names, whole or not at all: safetensors, or PyTorch's `.pt`.

    Raises:
        ConfigurationError: another suffix.
    """
    return write_state(model, path, official_name)


def official_name(name: str) -> str:
    """The official name of a tensor with any of the names in use."""
    parts = plain_parts(name)
    if parts[0] == "bert":
        parts[0] = "uniter"
    elif parts[0] in _ENCODER_PARTS:
        parts.insert(0, "uniter")
    official = ".".join(parts)
    return "cls.predictions.bias" if official == "cls.predictions.decoder.bias" else official


_NAMING = Naming(official_name, WORDS)
