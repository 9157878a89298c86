"""The published loops, written out plainly: the oracle of parity and the yardstick of cost.

VILLA's update as its released fine-tuning scripts compute it (clean pass with its graph kept, K passes, a backward of the
retained graph in each), and FreeLB's. Nothing is saved, shared or reordered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl import Adapter


@dataclass
class Record:
    logits: list[Tensor] = field(default_factory=list)
    deltas: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    loss: Tensor | float = 0.0


def symmetric_kl(a: Tensor, c: Tensor) -> Tensor:
    """Two Kullback-Leibler terms by `F.kl_div` on probabilities, gradients into both arguments."""
    p, q = a.softmax(-1), c.softmax(-1)
    one = F.kl_div(a.log_softmax(-1), q, reduction="none")
    other = F.kl_div(c.log_softmax(-1), p, reduction="none")
    return (one + other).sum(-1).mean()


def moved(delta: Tensor, gradient: Tensor, step_size: float, norm: str, radius: float) -> Tensor:
    rows = [-1] + [1] * (delta.ndim - 1)
    flat = gradient.flatten(1)
    size = flat.norm(dim=1) if norm == "l2" else flat.abs().amax(1)
    delta = delta + step_size * gradient / size.clamp(min=1e-8).view(rows)
    if math.isfinite(radius):
        if norm == "linf":
            return delta.clamp(-radius, radius)
        length = delta.flatten(1).norm(dim=1)
        delta = delta * (radius / length.clamp(min=radius)).view(rows)
    return delta


def villa(
    adapter: Adapter,
    batch: dict[str, Tensor],
    zeros: dict[str, Tensor],
    *,
    step_sizes: dict[str, float],
    steps: int = 3,
    kl_weight: float = 1.5,
    norm: str = "l2",
    radius: float = math.inf,
    alter: bool = False,
    before_pass: Callable[[], object] = lambda: None,
) -> Record:
    """One update's worth of gradients into `.grad`; `before_pass` may replay randomness."""
    record = Record()

    def run(deltas: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        before_pass()
        with adapter.inject(deltas):
            outputs = adapter.forward(batch)
        return adapter.logits(outputs), adapter.loss(outputs, batch).mean()

    clean, _ = run({})
    record.logits.append(clean.detach())
    deltas = {name: zeros[name].clone() for name in step_sizes}
    for step in range(steps):
        leaves = {name: delta.detach().requires_grad_() for name, delta in deltas.items()}
        groups = [{name: leaf} for name, leaf in leaves.items()] if alter else [leaves]
        total = torch.zeros((), dtype=clean.dtype)
        for group in groups:
            logits, task = run(group)
            record.logits.append(logits.detach())
            total = total + task + kl_weight * symmetric_kl(logits, clean)
        total = total / (steps * len(groups))
        total.backward(retain_graph=True)
        record.loss = record.loss + total.detach()
        record.deltas.append({name: leaf.detach() for name, leaf in leaves.items()})
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        record.gradients.append({name: g * steps * len(groups) for name, g in gradients.items()})
        if step < steps - 1:
            deltas = {n: moved(d.detach(), gradients[n], step_sizes[n], norm, radius) for n, d in leaves.items()}
    return record
