"""Calling a model on a batch, by its fields, and reading logits and a loss from whatever comes back.

Outputs may be an object with attributes (a `ModelOutput`), a mapping, a tuple or a tensor. A tuple is read as transformers
writes it: the loss first, if there is one, then the logits; a loss there is a tensor without axes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from advvl.adapters.injection import Batch
from advvl.errors import ConfigurationError, more

Outputs = Any


def copied(batch: Batch) -> Batch:
    """Return a shallow copy of a mapping that can be written to, so that taking fields out of it leaves the batch whole."""
    return copy.copy(batch) if isinstance(batch, MutableMapping) else batch


def run(model: nn.Module, batch: Batch) -> Outputs:
    """Call a model on a batch: by its fields where it has names for them.

    Raises:
        ConfigurationError: fields that are not the model's arguments.
    """
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except TypeError as error:
        if not any(words in str(error) for words in _MISCALLED):
            raise
        given = f"the fields {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ConfigurationError(
            f"expected a batch with the arguments of {type(model).__name__}, got {given}: {error}; "
            'pass call=…, as in call=lambda model, batch: model(batch["image"])'
        ) from error


_MISCALLED = (
    "keywords must be strings",
    "unexpected keyword argument",
    "required positional argument",
    "required keyword-only argument",
)


def field(outputs: Outputs, name: str) -> Any:
    """Return an entry of outputs by its name; None where there is none."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def read_logits(outputs: Outputs) -> Tensor:
    """Return the logits among a model's outputs.

    Raises:
        ConfigurationError: there are none.
    """
    logits = field(outputs, "logits")
    if isinstance(outputs, Tensor):
        logits = outputs
    elif logits is None and isinstance(outputs, tuple | list):
        rest = list(outputs) if _leading_loss(outputs) is None else list(outputs)[1:]
        logits = rest[0] if rest else None
    if not isinstance(logits, Tensor):
        raise ConfigurationError(
            f"expected outputs with logits to compare, got {_said(outputs)}; "
            "pass logits=… to the adapter, from the outputs to a tensor"
        )
    return logits


def read_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the loss among a model's outputs.

    Raises:
        ConfigurationError: there is none, or one that is no tensor.
    """
    del batch
    loss = field(outputs, "loss")
    if loss is None:
        loss = _leading_loss(outputs)
    if loss is not None and not isinstance(loss, Tensor):
        raise ConfigurationError(
            f"expected the loss of the outputs as a tensor, got {type(loss).__name__}; have the model give the tensor, "
            "without item"
        )
    if loss is None:
        raise ConfigurationError(
            f"expected outputs with a loss, got {_said(outputs)}; give what it is computed from "
            f"(labels, return_loss=True), or pass loss=…{more('no-loss')}"
        )
    return loss


def _leading_loss(outputs: Outputs) -> Tensor | None:
    """The scalar that a tuple begins with; a tensor with axes there need not be a loss."""
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def _said(outputs: Outputs) -> str:
    """A description of outputs for messages: their type and the names of their entries."""
    names = f" of {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    return f"{type(outputs).__name__}{names} without"
