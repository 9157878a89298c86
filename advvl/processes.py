"""Processes that train together: means over the rows of all of them, and that they agree on what they run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advvl.errors import ConfigurationError


def process_count() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def global_mean(losses: Tensor, counts: Tensor | None = None) -> Tensor:
    """The loss whose gradient, averaged over the processes as DDP and FSDP do, is that of the mean over all their entries.

    It is this process's sum, over the number of entries in all processes, times the number of processes: where processes
    hold different numbers of tokens, a mean of their means is not the mean. Every process has to call it; it makes one
    all-reduce of a scalar, which holds nothing of a graph.

    Arguments:
        losses: of any shape, one an entry.
        counts: of the same shape, which entries count: bool, or weights; None: all.

    Returns:
        A scalar; on one process the plain mean. Of no entries anywhere: 0, with a graph.
    """
    weights = torch.ones_like(losses) if counts is None else counts.to(losses.dtype)
    total = weights.detach().sum()
    if process_count() > 1:
        dist.all_reduce(total)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(weights > 0, losses * weights, torch.zeros_like(losses)).sum() / total * process_count()


def check_agreement(what: str, value: Any) -> None:
    """Raise ConfigurationError in every process if `value` is not the same in all of them, by its `repr`.

    Ends within the process group's timeout, also where a process is gone.
    """
    if process_count() == 1:
        return
    found: list[Any] = [None] * process_count()
    dist.all_gather_object(found, repr(value))
    different = [rank for rank, other in enumerate(found) if other != found[0]]
    if different:
        raise ConfigurationError(
            f"expected {what} to be the same in all {process_count()} processes, got {found[0]} in process 0 and "
            f"{found[different[0]]} in process {different[0]}; start every process with the same arguments and files"
        )
