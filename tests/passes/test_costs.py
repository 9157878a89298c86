"""What a step costs against the published loop: floating-point operations as dispatched, and graphs alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.counting import Flops
from support.published import villa as published_villa
from support.toy import toy, toy_batch
from torch import Tensor

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    SymmetricKL,
    adapt,
)
from advvl.models.uniter.model import UniterConfig, gather_index
from advvl.tasks.uniter.vqa import UniterForVQA

pytestmark = pytest.mark.slow


def uniter(layers: int = 4) -> UniterForVQA:
    """UNITER-base at a quarter of every size, with a third of its layers; eager attention, which the registry counts."""
    config = UniterConfig.base(
        num_hidden_layers=layers,
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        vocab_size=500,
        img_dim=512,
    )
    config._attn_implementation = "eager"
    return UniterForVQA(config, num_answers=25).train()


def batch(rows: int = 1, words: int = 5, regions: int = 9) -> dict[str, Tensor]:
    lengths, boxes = torch.full((rows,), words), torch.full((rows,), regions)
    return {
        "input_ids": torch.randint(1, 500, (rows, words)),
        "position_ids": torch.arange(words)[None],
        "img_feat": torch.randn(rows, regions, 512),
        "img_pos_feat": torch.rand(rows, regions, 7),
        "attn_masks": torch.ones(rows, words + regions, dtype=torch.long),
        "gather_index": gather_index(lengths, boxes, words),
        "targets": torch.rand(rows, 25),
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
        published_villa(target, inputs, {"text": torch.zeros(1, 5, 192)}, step_sizes={"text": 1e-3})
    assert ours.total / published.total <= most


class Ledger:
    """How many rows have a graph alive, and the most there were."""

    def __init__(self) -> None:
        self.live = self.peak = 0


class Counted(torch.autograd.Function):
    """Enters its rows in the ledger for as long as the graph that it is in lives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ledger: Ledger) -> Tensor:
        class Held:
            rows = len(x)

            def __del__(self) -> None:
                ledger.live -= self.rows

        ctx.held = Held()
        ledger.live += len(x)
        ledger.peak = max(ledger.peak, ledger.live)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def peak_graphs(run: Callable[[Adapter], object]) -> float:
    """The most graphs of a pass over the batch that are alive at once."""
    ledger = Ledger()
    target = toy()
    target.model.head.register_forward_hook(lambda module, args, output: Counted.apply(output, ledger))
    run(target)
    assert ledger.live == 0
    return ledger.peak / 3


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("dropout", ["fresh", "shared"])
@pytest.mark.parametrize(
    ("modalities", "order"),
    [(["text"], "together"), (["image"], "together"), (["text", "image"], "together"), (["text", "image"], "in turn")],
)
def test_two_graphs_live_at_once_whatever_the_steps(
    modalities: list[str], order: Any, dropout: Any, steps: int
) -> None:
    """The published loop holds three: the clean one, this pass's, and the one before's until it is overwritten."""
    perturber = EmbeddingPerturber(**{m: Ascent(L2(), step_size=0.3) for m in modalities})
    method = AdversarialTraining(perturber, FreeLB(steps, order), SymmetricKL(1.5), dropout=dropout)
    assert peak_graphs(lambda target: method.step(target, toy_batch())) <= 2
    shapes = {"text": (3, 5, 8), "image": (3, 4, 5)}
    zeros = {m: torch.zeros(shapes[m], dtype=torch.float64) for m in modalities}
    sizes = dict.fromkeys(modalities, 0.3)
    alter = order == "in turn"
    theirs = peak_graphs(
        lambda target: published_villa(target, toy_batch(), zeros, step_sizes=sizes, steps=steps, alter=alter)
    )
    assert theirs >= 3


def test_the_graphs_of_an_attack_live_one_at_a_time() -> None:
    perturber = EmbeddingPerturber(text=Ascent(L2(1.0), step_size=0.3))
    assert peak_graphs(lambda target: Attack(perturber, PGD(4))(target, toy_batch())) == 1
