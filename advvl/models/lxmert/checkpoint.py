"""LXMERT's checkpoints: read under any of the names in use into transformers' models, written under the published names.

Names in use: pre-training's `bert.*`, `cls.*`, `obj_predict_head.*`, `answer_head.*`; those of LXMERT's and
LXMERT-AdvTrain's tasks, `lxrt_encoder.model.bert.*` or `model.bert.*`, and `logit_fc.*`; transformers' `lxmert.*`; `module.`
of DataParallel anywhere. Reports and errors use transformers' names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from torch import nn

from advvl.models.state_files import LoadReport, Naming, load_state, plain_parts, read_state, write_state

LXMERT_PRETRAINING_HEADS: Final = ("cls.*", "obj_predict_head.*")

_HEADS = (*LXMERT_PRETRAINING_HEADS, "answer_head.*")
_ENCODER_PARTS = ("embeddings", "encoder", "pooler")


def load_lxmert_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    encoder_only: bool = False,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> LoadReport:
    """Read a `.safetensors` or PyTorch file into a model, all of it or nothing; no code in the file is run.

    Arguments:
        model: an LXMERT of transformers, or a task here.
        encoder_only: ignore the file's heads and leave the model's as they are, as published fine-tuning does with a
            pre-trained checkpoint (`--loadLXMERT`), whose answer head has other answers.
        allow_missing, allow_unexpected: names that the file may lack or have in addition: `"answer_head.*"`, or `"cls"`
            for everything in it.

    Raises:
        CheckpointError: a file that is missing, truncated, or more than tensors; one that does not fit the model. The
            model is then as it was.
    """
    state = read_state(path)
    if not encoder_only:
        return load_state(
            model,
            state,
            LXMERT_NAMING,
            source=path,
            allow_missing=allow_missing,
            allow_unexpected=allow_unexpected,
        )
    encoder = {name: value for name, value in state.items() if lxmert_name(name).startswith("lxmert.")}
    report = load_state(
        model,
        encoder,
        LXMERT_NAMING,
        source=path,
        allow_missing=(*allow_missing, *_HEADS),
        allow_unexpected=allow_unexpected,
    )
    left_out = tuple(lxmert_name(name) for name in state if name not in encoder)
    return LoadReport(report.missing, report.unexpected + left_out)


def save_lxmert_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's tensors under their published names, whole or not at all: safetensors, or PyTorch's `.pt`.

    A model with only an answer head is named like a task's; any other is named as in pre-training.

    Raises:
        ConfigurationError: another suffix.
    """
    heads = {lxmert_name(name).partition(".")[0] for name in model.state_dict()} - {"lxmert"}
    return write_state(model, path, partial(original_name, of_task=heads == {"answer_head"}))


def lxmert_name(name: str) -> str:
    """The name in transformers of a tensor with any of the names in use."""
    parts = plain_parts(name)
    for prefix in ("lxrt_encoder", "model"):
        if parts[0] == prefix and len(parts) > 1:
            del parts[0]
    if parts[0] == "bert":
        parts[0] = "lxmert"
    elif parts[0] in _ENCODER_PARTS:
        parts.insert(0, "lxmert")
    elif parts[0] == "logit_fc":
        parts.insert(0, "answer_head")
    return ".".join(parts)


def original_name(name: str, *, of_task: bool) -> str:
    """The published name of a tensor, in a task's checkpoint or in pre-training's; `name` is any of those in use."""
    part, _, rest = lxmert_name(name).partition(".")
    if part == "lxmert":
        return f"lxrt_encoder.model.bert.{rest}" if of_task else f"bert.{rest}"
    return rest if part == "answer_head" and of_task else f"{part}.{rest}"


LXMERT_NAMING: Final = Naming(
    lxmert_name,
    frozenset({"lxmert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"}),
)
