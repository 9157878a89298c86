"""UNITER's optimiser: AdamW with the published groups of weight decay, and a separate rate for a task's head."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

UNDECAYED: Final = ("bias", "LayerNorm.bias", "LayerNorm.weight")
"""A parameter with one of these in its name has no weight decay."""


def uniter_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    epsilon: float = 1e-6,
    head_rate: float = 1.0,
) -> torch.optim.AdamW:
    """Make AdamW over a task's trainable parameters, in the groups of the published code (Chen et al., ECCV 2020).

    `img_layer_norm.weight`, `pos_layer_norm.weight` and the normalisations in heads are decayed, since the published code
    goes by names. It decays after its step and divides by √v + ε before the bias correction of v: torch's AdamW differs by
    a factor 1 − O(learning_rate) of a step in the one, and in early updates by how ε counts in the other.

    Arguments:
        learning_rate: before the schedule.
        head_rate: factor of the rate of parameters that are not in `uniter.*`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = head_rate != 1.0 and not name.startswith("uniter.")
            decayed = not any(part in name for part in UNDECAYED)
            groups.setdefault((head, decayed), []).append(parameter)
    described: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": learning_rate * (head_rate if head else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (head, decayed), parameters in sorted(groups.items())
    ]
    return torch.optim.AdamW(described, lr=learning_rate, betas=betas, eps=epsilon)
