"""Examples, learning rate and parameter groups of an update, as pure functions of its number."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from advvl.fit.bert_adam import warmup_linear
from advvl.fit.options import OptimizerOptions
from advvl.runtime.randomness import derive_seed

_NORMALISATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def schedule(options: OptimizerOptions, update: int, updates: int) -> float:
    """Return the factor of the learning rate, in (0, 1], in the update of that number, of 0 to `updates` - 1.

    "one-cycle" rises and falls along half cosines (Smith & Topin, 2018, arXiv:1708.07120), "linear" along straight
    lines (as BERT is trained), "warmup-linear" as LXMERT's optimiser has it: from 0 in the first update, and "uniter" the
    same one update ahead, with a rate of 1e-8 in the last update, where it would be 0 (Chen et al., ECCV 2020).
    """
    if options.schedule == "uniter":
        return warmup_linear(update + 1, updates, options.warmup) or 1e-8 / options.learning_rate
    if options.schedule == "warmup-linear":
        return warmup_linear(update, updates, options.warmup)
    if updates <= 1:
        return 1.0
    position, rising = update / (updates - 1), options.warmup
    if options.schedule == "linear":
        if position < rising:
            return (update + 1) / (rising * (updates - 1) + 1)
        return (updates - update) / (updates - rising * (updates - 1))
    low, final = 1 / 25, 1 / 25e4  # as in torch.optim.lr_scheduler.OneCycleLR
    if position < rising:
        return 1 - (1 - low) * (1 + math.cos(math.pi * position / rising)) / 2
    return final + (1 - final) * (1 + math.cos(math.pi * (position - rising) / (1 - rising))) / 2


def updates_per_epoch(examples: int, batch_size: int) -> int:
    """The number of whole batches in an epoch; one, of all examples, if they do not fill a batch."""
    return max(1, examples // batch_size)


def examples_of(update: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """Return the examples of an update: each epoch is a separate permutation in whole batches, without the remainder."""
    epoch, place = divmod(update, updates_per_epoch(examples, batch_size))
    chosen: list[int] = _order(examples, seed, epoch)[place * batch_size : (place + 1) * batch_size].tolist()
    return chosen


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    """An epoch's permutation, cached between updates: with millions of examples it takes longer than some updates."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: with weight decay, and (biases, normalisations) without."""
    decayed: dict[int, Tensor] = {}
    spared: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                group = spared if name.endswith("bias") or isinstance(module, _NORMALISATIONS) else decayed
                group.setdefault(id(parameter), parameter)
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(spared.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
