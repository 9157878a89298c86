"""One VILLA update on a UNITER: ours against the published loop, and against the passes that it cannot do without.

pytest benchmarks/ --benchmark-only
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
from published import villa as published_villa
from pytest_benchmark.fixture import BenchmarkFixture  # type: ignore[import-untyped]
from torch import Tensor

import advvl
from advvl import Adapter, adapt
from advvl.models.uniter import UniterConfig, gather_index
from advvl.tasks.vqa import UniterForVQA

STEPS, ROWS, WORDS, REGIONS, WIDTH = 3, 8, 20, 36, 256


def target() -> Adapter:
    config = UniterConfig.tiny(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=4 * WIDTH, vocab_size=1000
    )
    return adapt(UniterForVQA(config, num_answers=100).train())


def batch(features: int) -> dict[str, Tensor]:
    words, regions = torch.full((ROWS,), WORDS), torch.full((ROWS,), REGIONS)
    return {
        "input_ids": torch.randint(1, 1000, (ROWS, WORDS)),
        "img_feat": torch.randn(ROWS, REGIONS, features),
        "img_pos_feat": torch.rand(ROWS, REGIONS, 7),
        "attn_masks": torch.ones(ROWS, WORDS + REGIONS, dtype=torch.long),
        "gather_index": gather_index(words, regions, WORDS),
        "targets": torch.rand(ROWS, 100),
    }


def ours(model: Adapter, inputs: dict[str, Tensor], dropout: str) -> None:
    advvl.villa(step_sizes={"text": 1e-3}, steps=STEPS, dropout=dropout).step(model, inputs)  # type: ignore[arg-type]


def published(model: Adapter, inputs: dict[str, Tensor]) -> None:
    zeros = {"text": torch.zeros(ROWS, WORDS, WIDTH)}
    published_villa(model, inputs, zeros, step_sizes={"text": 1e-3}, steps=STEPS)


def passes(model: Adapter, inputs: dict[str, Tensor], count: int) -> None:
    for _ in range(count):
        model.loss(model.forward(inputs), inputs).mean().backward()


PROVIDERS: dict[str, Callable[[Adapter, dict[str, Tensor]], None]] = {
    "ours, fresh masks": lambda model, inputs: ours(model, inputs, "fresh"),
    "ours, shared masks": lambda model, inputs: ours(model, inputs, "shared"),
    "published loop": published,
    f"limit: {STEPS} bare passes": lambda model, inputs: passes(model, inputs, STEPS),
    f"limit: {STEPS + 1} bare passes": lambda model, inputs: passes(model, inputs, STEPS + 1),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.benchmark(group="VILLA update")
def test_villa_update(benchmark: BenchmarkFixture, provider: str) -> None:
    torch.manual_seed(0)
    model = target()
    inputs = batch(model.model.config.img_dim)
    benchmark.extra_info |= {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "float32",
        "shape": f"{ROWS} rows, {WORDS} words, {REGIONS} regions, width {WIDTH}, 4 layers, K={STEPS}",
    }

    def update() -> None:
        model.model.zero_grad()
        PROVIDERS[provider](model, inputs)

    benchmark.pedantic(update, rounds=10, warmup_rounds=2)
    gradient = torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
