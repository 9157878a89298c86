"""Processes that train together: means over all their rows, gathering their results, and checking that they agree.

All processes have to call the functions here, except the first three, equally often and in the same order. If one
process does not take part, the call ends with an error within the process group's timeout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.runtime.descriptions import described

T = TypeVar("T")


def in_process_group() -> bool:
    """True if torch.distributed has been set up, even for one process."""
    return dist.is_available() and dist.is_initialized()


def process_count() -> int:
    """The number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if in_process_group() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if in_process_group() else 0


def process_mean(value: Tensor) -> Tensor:
    """The mean over the processes of a floating-point tensor with the same shape in all of them; without a graph.

    For example, to log a report's loss; one all-reduce.
    """
    mean = value.detach().clone()
    if process_count() > 1:
        dist.all_reduce(mean)
        mean /= process_count()
    return mean


def first_process(value: Tensor) -> Tensor:
    """The value of a tensor in process 0, with the same shape in all processes, such as a random start that they share."""
    value = value.detach().clone()
    if process_count() > 1:
        dist.broadcast(value, 0)
    return value


def share(count: Tensor) -> Tensor:
    """The factor that weights a mean over this process's own entries by their share among all processes.

    DDP and FSDP average the processes' gradients. Where processes hold different numbers of entries, such as masked
    tokens, the mean of their means is not the mean. This factor, the number of its own entries over the average number
    of all processes, corrects that for all passes of an update and for a regulariser's mean over the same entries:

        part = share(masked.sum())  # one all-reduce of a scalar
        method.step(target, batch, backward=lambda loss: (part * loss).backward())

    Arguments:
        count: a scalar, the number of entries of this process.

    Returns:
        A scalar; 1 for a process without entries, whose loss must be 0, with a graph: divide the sum by
        `count.clamp(min=1)`. The mean losses of torch and transformers are NaN there.
    """
    count = count.detach().to(torch.promote_types(count.dtype, torch.float32))
    mean = process_mean(count)
    return torch.where(count > 0, count / torch.where(mean > 0, mean, torch.ones_like(mean)), torch.ones_like(count))


def global_mean(losses: Tensor, counts: Tensor | None = None) -> Tensor:
    """The loss whose gradient, averaged over the processes as DDP and FSDP do, is that of the mean over all their entries.

    It is this process's sum divided by the average number of entries per process: if processes hold different numbers
    of tokens, a mean of their means is not the mean. It makes one all-reduce of a scalar; in the `loss` of a step that
    is one for every pass, while `share` makes one for all passes.

    Arguments:
        losses: of any shape, one per entry.
        counts: of the same shape, the entries that count, as bool or weights; None: all.

    Returns:
        A scalar; on one process the plain mean. 0, with a graph, if no process has entries.
    """
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))  # fp16 counts to 2,048 alone
    weights = torch.ones_like(losses) if counts is None else counts.to(losses.dtype)
    mean = process_mean(weights.sum())
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(weights > 0, losses * weights, torch.zeros_like(losses)).sum() / mean


def collected(found: Mapping[int, T]) -> dict[int, T]:
    """Gather numbered results of all processes, in the order of their numbers; a number found by several is kept once.

    For an evaluation in which process r of n takes examples or batches r, r + n, r + 2n, …: nothing is padded, and
    nothing is counted twice. Results must be picklable and on the CPU.
    """
    parts: list[Any] = [dict(found)]
    if process_count() > 1:
        parts = [None] * process_count()
        dist.all_gather_object(parts, dict(found))
    together: dict[int, T] = {number: value for part in reversed(parts) for number, value in part.items()}
    return dict(sorted(together.items()))


def check_agreement(what: str, value: Any) -> None:
    """Raise ConfigurationError in every process if the description of `value` is not the same in all of them.

    Call it once before training, as `check_agreement("the method", method)`: different numbers of passes, step sizes or
    weights would otherwise go unnoticed, since processes meet only in the reduction of each update.
    """
    if process_count() == 1:
        return
    found: list[Any] = [None] * process_count()
    dist.all_gather_object(found, described(value))
    different = [rank for rank, other in enumerate(found) if other != found[0]]
    if different:
        here, there = _differing(found[0], found[different[0]])
        raise ConfigurationError(
            f"expected {what} to be the same in all {process_count()} processes, got {here} in process 0 and {there} in "
            f"process {different[0]}; give all the same arguments and files"
        )


def _differing(one: str, other: str, around: int = 60) -> tuple[str, str]:
    """Two texts; if they are long, the parts around their differences."""
    if max(len(one), len(other)) <= 2 * around:
        return one, other
    first = max(_alike(one, other) - around, 0)
    last = max(_alike(one[first:][::-1], other[first:][::-1]) - around, 0)
    before, after = "…" * (first > 0), "…" * (last > 0)
    here, there = (f"{before}{text[first : len(text) - last]}{after}" for text in (one, other))
    return here, there


def _alike(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
