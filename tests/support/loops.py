"""Pieces of published loops, for models that take a perturbation as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advvl import Adapter, AdversarialTraining, PassTrace
from support.plain import agree


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL of the second's softmax from the first's, the mean over rows."""
    p, q = first.softmax(1), second.softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


def symmetric(first: Tensor, second: Tensor) -> Tensor:
    return kl(first, second) + kl(second, first)


def by_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def length(x: Tensor) -> Tensor:
    return by_rows(x.flatten(1).norm(dim=1), x)


def stepped(method: AdversarialTraining, target: Adapter, batch: Any, **options: Any) -> list[PassTrace]:
    """The passes of one step, with the clean one, if there was any, left out."""
    passes: list[PassTrace] = []
    method.step(target, batch, generator=torch.Generator().manual_seed(3), trace=passes.append, **options)
    return [seen for seen in passes if seen.modalities]


def climbed(start: Tensor, objective: Callable[[Tensor], Tensor], move: Callable[[Tensor, Tensor], Tensor], steps: int):
    """Every perturbation from the start on; `objective` may draw dropout masks."""
    deltas = [start]
    for _ in range(steps):
        leaf = deltas[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf), leaf)
        deltas.append(move(leaf.detach(), gradient))
    return deltas


def agree_on_deltas(passes: list[PassTrace], modality: str, expected: list[Tensor]) -> None:
    assert len(passes) == len(expected)
    for seen, delta in zip(passes, expected, strict=True):
        agree(seen.deltas[modality], delta)


def linf(x: Tensor, *, step_size: float, radius: float, box: tuple[float, float] | None):
    """A sign step from a perturbation of `x`, into the ball, then into the box."""

    def move(delta: Tensor, gradient: Tensor) -> Tensor:
        delta = (delta + step_size * gradient.sign()).clamp(-radius, radius)
        return delta if box is None else (x + delta).clamp(*box) - x

    return move


def l2(*, step_size: float, radius: float):
    def move(delta: Tensor, gradient: Tensor) -> Tensor:
        delta = delta + step_size * gradient / length(gradient)
        return delta * (radius / length(delta)).clamp(max=1)

    return move


def token_linf(delta: Tensor, gradient: Tensor, mask: Tensor, step_size: float, radius: float) -> Tensor:
    largest = gradient.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, gradient / largest.clamp(min=1e-300), torch.zeros_like(gradient))
    return (delta + step_size * unit).clamp(-radius, radius) * mask.unsqueeze(-1)


def drifted(target: Adapter) -> None:
    """Train a little: away from the frozen copy, so that the distance is not zero at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
