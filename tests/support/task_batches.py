"""A tiny model of each of UNITER's tasks with a random batch for it, by the task's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advvl.models.uniter.model import UniterConfig
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2
from advvl.tasks.uniter.referring import UniterForReferringExpressions
from advvl.tasks.uniter.retrieval import UniterForRetrieval
from advvl.tasks.uniter.vcr import UniterForVCR
from advvl.tasks.uniter.ve import UniterForVE
from advvl.tasks.uniter.vqa import UniterForVQA
from support.uniter_batches import uniter_batch


def model_of(task: str, seed: int = 0, **options: Any) -> UniterTask:
    torch.manual_seed(seed)
    return MODELS[task](UniterConfig.tiny(initializer_range=0.2, **options)).double()


MODELS: dict[str, Callable[[UniterConfig], UniterTask]] = {
    "vqa": lambda config: UniterForVQA(config, num_answers=5),
    "ve": UniterForVE,
    "nlvr2-paired-attn": UniterForNLVR2,
    "nlvr2-paired": lambda config: UniterForNLVR2(config, variant="paired"),
    "nlvr2-triplet": lambda config: UniterForNLVR2(config, variant="triplet"),
    "vcr": UniterForVCR,
    "retrieval": UniterForRetrieval,
    "re-cls": UniterForReferringExpressions,
    "re-rank": lambda config: UniterForReferringExpressions(config, mlp=2, loss="rank"),
}


def batch_of(task: str, **padding: Any) -> dict[str, Any]:
    """A batch of each task; `padding` widens it, as `uniter_batch` says."""
    family = task.partition("-")[0]
    if family == "vqa":
        return uniter_batch(**padding) | {"targets": torch.linspace(0, 1, 20, dtype=torch.float64).view(4, 5)}
    if family == "ve":
        shares = [[0, 1, 0], [0.4, 0, 0.6], [1, 0, 0], [0, 0, 1]]
        return uniter_batch(**padding) | {"targets": torch.tensor(shares, dtype=torch.float64)}
    if family == "nlvr2":
        return pairs(triplet=task.endswith("triplet"), **padding)
    if family == "vcr":
        fields = uniter_batch((9, 6, 7, 8), (5, 5, 5, 5), **padding)
        places = torch.arange(fields["input_ids"].shape[1])
        types = torch.where(places < 3, 0, torch.where(places < 5, 2, 3))
        types = types.expand_as(fields["input_ids"]) * (fields["input_ids"] > 0)
        return fields | {"txt_type_ids": types, "targets": torch.tensor([[0], [1], [0], [0]])}
    if family == "retrieval":
        return uniter_batch((9, 9, 6, 5, 5, 7), (5, 3, 5, 4, 2, 4), **padding) | {"sample_size": 3}
    return uniter_batch(num_bbs=(5, 7, 4, 2), **padding) | {"targets": torch.tensor([[3], [0], [2], [1]])}


def pairs(*, triplet: bool, **padding: Any) -> dict[str, Tensor]:
    """Three sentences with two images each; both rows of a pair have its words."""
    targets = torch.tensor([1, 0, 1])
    if triplet:
        fields = uniter_batch((9, 6, 3), (7, 5, 4), **padding)
        left, places = torch.tensor([3, 4, 1]), torch.arange(fields["img_feat"].shape[1])
        real = places < fields["num_bbs"][:, None]
        types = torch.where(places < left[:, None], 1, 2) * real
    else:
        fields = uniter_batch((9, 9, 6, 6, 3, 3), (5, 3, 4, 7, 2, 4), **padding)
        fields["input_ids"][1::2] = fields["input_ids"][0::2]
        places = torch.arange(fields["img_feat"].shape[1])
        types = (places < fields["num_bbs"][:, None]) * torch.tensor([1, 2]).repeat(3)[:, None]
    return fields | {"img_type_ids": types, "targets": targets}
