"""Floating-point operations of a step against the published loop's, counted as they are dispatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import villa as published_villa
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advvl import L2, AdversarialTraining, Ascent, EmbeddingPerturber, FreeLB, SymmetricKL, adapt
from advvl.models.uniter import UniterConfig, gather_index
from advvl.tasks.vqa import UniterForVQA


class Flops(TorchDispatchMode):
    """Counts every operation that torch's registry has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def uniter(layers: int = 4) -> UniterForVQA:
    """UNITER-base with a third of its layers and a small vocabulary; eager attention, which the registry counts."""
    config = UniterConfig.base(num_hidden_layers=layers, vocab_size=2000, img_dim=2048)
    config._attn_implementation = "eager"
    return UniterForVQA(config, num_answers=100).train()


def batch(rows: int = 1, words: int = 20, regions: int = 36) -> dict[str, Tensor]:
    lengths, boxes = torch.full((rows,), words), torch.full((rows,), regions)
    return {
        "input_ids": torch.randint(1, 2000, (rows, words)),
        "position_ids": torch.arange(words)[None],
        "img_feat": torch.randn(rows, regions, 2048),
        "img_pos_feat": torch.rand(rows, regions, 7),
        "attn_masks": torch.ones(rows, words + regions, dtype=torch.long),
        "gather_index": gather_index(lengths, boxes, words),
        "targets": torch.rand(rows, 100),
    }


@pytest.mark.parametrize(("dropout", "most"), [("fresh", 0.752), ("shared", 0.627)])
def test_villa_costs_what_the_algebra_saves(dropout: Any, most: float) -> None:
    model, inputs = uniter(), batch()
    target = adapt(model)
    method = AdversarialTraining(
        EmbeddingPerturber(text=Ascent(L2(), step_size=1e-3)), FreeLB(3), SymmetricKL(1.5), dropout=dropout
    )
    method.step(target, inputs)  # the first step with shared masks verifies once that replay works
    with Flops() as ours:
        method.step(target, inputs)
    with Flops() as published:
        published_villa(target, inputs, {"text": torch.zeros(1, 20, 768)}, step_sizes={"text": 1e-3})
    assert ours.total / published.total <= most
