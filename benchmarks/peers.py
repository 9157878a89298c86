"""What others would use: their update of a perturbation, by their own code where it can be reached, else transcribed.

They keep the perturbed tensor, not the perturbation: each takes x, its gradient and the clean x0, and gives the new x.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def peer(name: str) -> Any:
    """The module of a peer; skips the benchmark if it is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, of what they import
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name.partition('.')[0]} is not installed ({error}); pip install 'advvl[bench]'")


def torchattacks_l2(step_size: float, radius: float) -> Update:
    """PGDL2's update, transcribed; it takes 4-D tensors in [0, 1] alone."""

    def update(x: Tensor, g: Tensor, x0: Tensor) -> Tensor:
        shape, rows = x.shape, len(x)
        x, g, x0 = (t.view(rows, 1, -1, t.shape[-1]) for t in (x, g, x0))
        g = g / (torch.norm(g.view(rows, -1), p=2, dim=1) + 1e-10).view(rows, 1, 1, 1)
        delta = x.detach() + step_size * g - x0
        factor = radius / torch.norm(delta.view(rows, -1), p=2, dim=1)
        delta = delta * torch.min(factor, torch.ones_like(factor)).view(-1, 1, 1, 1)
        return torch.clamp(x0 + delta, min=0, max=1).detach().view(shape)

    return update


def torchattacks_linf(step_size: float, radius: float) -> Update:
    """PGD's update, transcribed."""

    def update(x: Tensor, g: Tensor, x0: Tensor) -> Tensor:
        delta = torch.clamp(x.detach() + step_size * g.sign() - x0, min=-radius, max=radius)
        return torch.clamp(x0 + delta, min=0, max=1).detach()

    return update


def foolbox_update(attack: str, step_size: float, radius: float) -> Update:
    """The update of foolbox's gradient descent by its own methods, without its model and loss."""
    eagerpy, attacks = peer("eagerpy"), peer("foolbox").attacks
    method = getattr(attacks, attack)(abs_stepsize=step_size, steps=1, random_start=False)

    def update(x: Tensor, g: Tensor, x0: Tensor) -> Tensor:
        x_, g_, x0_ = eagerpy.astensors(x, g, x0)
        moved = x_ + step_size * method.normalize(g_, x=x_, bounds=(0, 1))
        return eagerpy.clip(method.project(moved, x0_, radius), 0, 1).raw  # type: ignore[no-any-return]

    return update


def captum_linf(step_size: float, radius: float) -> Update:
    """The update of `captum.robust.PGD`, transcribed; it leaves entries whose gradient is below 1e-6 where they are."""

    def update(x: Tensor, g: Tensor, x0: Tensor) -> Tensor:
        moved = torch.where(torch.abs(g) > 1e-6, x + step_size * torch.sign(g), x)
        return torch.clamp(x0 + torch.clamp(moved - x0, -radius, radius), min=0, max=1).detach()

    return update
