"""Weights moved for a pass: their selection, their move, and their restoration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from advvl.errors import ConfigurationError, more
from advvl.perturbers.weights import WeightAscent
from advvl.runtime.names import without_wrappers


def check_whole(model: nn.Module) -> None:
    """Raise ConfigurationError if a process holds only a part of a parameter that trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (hasattr(parameter, "placements") or hasattr(parameter, "ds_id")):
            raise ConfigurationError(
                f"expected whole parameters to move, got {name!r} sharded over processes; train under DDP, or without "
                f"weights=…{more('sharded-weights')}"
            )


def chosen_of(model: nn.Module, ascent: WeightAscent) -> dict[str, nn.Parameter]:
    """The parameters that an ascent moves, by their names without the prefixes of wrappers.

    Raises:
        ConfigurationError: there are none.
    """
    named = ((".".join(without_wrappers(name.split("."))), p) for name, p in model.named_parameters())
    found = {n: p for n, p in named if p.requires_grad and (ascent.chosen is None or ascent.chosen(n, p))}
    if not found:
        raise ConfigurationError("expected a parameter to move by WeightAscent, got none; let chosen accept some")
    return found


@contextmanager
def moved(weights: Mapping[str, nn.Parameter], steps: Mapping[str, Tensor]) -> Iterator[None]:
    """Move the weights by these steps inside this context; afterwards they are restored bit for bit."""
    before = {name: weights[name].detach().clone() for name in steps}
    try:
        with torch.no_grad():
            for name, step in steps.items():
                weights[name].copy_(weights[name].to(step.dtype) + step)  # added wide, and cast once
        torch.clear_autocast_cache()  # of the original weights
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                weights[name].copy_(value)
        torch.clear_autocast_cache()
