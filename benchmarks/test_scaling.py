"""How the cost of a VILLA update grows: with K, with the batch, with the length of the text.

Operations are counted, so that the growth is asserted exactly: a step of K passes costs K or K+1 passes of the model at
every size, and its memory does not grow with K. Times are there to look at. The benchmark's own time is the largest size's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from measures import flops, peak_bytes
from races import Entry, Pace, Race, recorded
from torch import Tensor

import advvl
from advvl import adapt
from advvl.models.uniter.model import UniterConfig, gather_index
from advvl.tasks.uniter.vqa import UniterForVQA

pytestmark = pytest.mark.benchmark(timer=recorded)

REGIONS, WIDTH = 16, 128
AXES = {"K": (3, 4, 6, 8, 12), "rows": (1, 2, 4, 8), "words": (16, 32, 64, 128)}
DEFAULTS = {"K": 3, "rows": 4, "words": 20}
EXACT, FLAT = 1e-3, 0.02  # relative: of operations, which are counted; of memory, where K adds a number or two

Masks = Literal["fresh", "shared"]


@dataclass(frozen=True)
class Size:
    K: int
    rows: int
    words: int


class Bench:
    """A model and a batch of one size, and the passes of a VILLA update on it."""

    def __init__(self, size: Size, masks: Masks, device: torch.device) -> None:
        config = UniterConfig.tiny(
            hidden_size=WIDTH,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            vocab_size=500,
            max_position_embeddings=max(AXES["words"]),
        )
        self.size, self.masks, self.device = size, masks, device
        self.model = UniterForVQA(config, num_answers=50).to(device).train()
        self.target = adapt(self.model)
        rows = size.rows
        fields = {
            "input_ids": torch.randint(1, 500, (rows, size.words)),
            "img_feat": torch.randn(rows, REGIONS, config.img_dim),
            "img_pos_feat": torch.rand(rows, REGIONS, 7),
            "attn_masks": torch.ones(rows, size.words + REGIONS, dtype=torch.long),
            "gather_index": gather_index(torch.full((rows,), size.words), torch.full((rows,), REGIONS), size.words),
            "targets": torch.rand(rows, 50),
        }
        self.inputs = {name: value.to(device) for name, value in fields.items()}
        self.method = advvl.villa(step_sizes={"text": 1e-3}, steps=size.K, dropout=masks)

    def step(self) -> None:
        self.model.zero_grad()
        self.method.step(self.target, self.inputs)

    def entry(self) -> Entry:
        self.step()  # with shared masks, the first verifies that they repeat
        facts = {
            "flops": flops(self.step),
            "pass_flops": flops(self._pass),
            "peak_bytes": peak_bytes(self.step, self.device),
        }
        return Entry(self.step, self._check, "ours", facts)

    def _pass(self) -> None:
        self._loss().backward()

    def _loss(self) -> Tensor:
        return self.target.loss(self.target.forward(self.inputs), self.inputs).mean()

    def _check(self) -> None:
        assert all(p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None)


def slope(x: list[int], y: list[float]) -> float:
    """The exponent of a power law through these, fitted on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@pytest.mark.parametrize("masks", ["fresh", "shared"])
@pytest.mark.parametrize("axis", AXES)
def test_growth(race: Race, device: torch.device, axis: str, masks: Masks) -> None:
    sizes = {str(value): Size(**DEFAULTS | {axis: value}) for value in AXES[axis]}

    def build() -> dict[str, Callable[[], Entry]]:
        return {name: partial(_entry, size, masks, device) for name, size in sizes.items()}

    title = f"against {axis}, {masks} masks"
    lanes = race.races.of(f"scaling: {title}", build, Pace(budget=3.0, least=5, most=20))
    for lane in lanes.values():
        if lane.failure is not None:
            raise lane.failure
    x = list(AXES[axis])
    counted = [lane.facts["flops"] for lane in lanes.values()]
    one = [lane.facts["pass_flops"] for lane in lanes.values()]
    peaks = [lane.facts["peak_bytes"] for lane in lanes.values()]
    fits: dict[str, Any] = {
        "time_slope": slope(x, [lane.median for lane in lanes.values()]),
        "flops_slope": slope(x, counted),
        "passes": [step / pass_ for step, pass_ in zip(counted, one, strict=True)],
    }
    if axis == "K":
        each, constant = np.polyfit(x, fits["passes"], 1)
        fits |= {"passes_per_K": float(each), "passes_besides": float(constant)}
        assert math.isclose(each, 1.0, rel_tol=EXACT), "expected one pass of the model more for one more K"
        assert constant <= (1 if masks == "fresh" else 1 / 2) + EXACT
        assert max(peaks) <= min(peaks) * (1 + FLAT), "expected memory that does not grow with K"
    else:
        assert max(fits["passes"]) <= min(fits["passes"]) * (1 + 2 * FLAT), "expected the model's own growth"
    if axis == "rows":
        assert math.isclose(fits["flops_slope"], 1.0, rel_tol=EXACT)
    largest = list(lanes)[-1]
    points = [
        {"x": value, "median": lane.median, "flops": lane.facts["flops"], "peak_bytes": lane.facts["peak_bytes"]}
        for value, lane in zip(x, lanes.values(), strict=True)
    ]
    shape = f"{REGIONS} regions, width {WIDTH}, 2 layers" + "".join(
        f", {n} {name}" for name, n in DEFAULTS.items() if name != axis
    )
    lanes[largest].facts |= {"axis": axis, "masks": masks, "points": points, "dtype": "float32", "shape": shape, **fits}
    race.report("scaling", title, f"{axis} = {largest}", lanes[largest])


def _entry(size: Size, masks: Masks, device: torch.device) -> Entry:
    return Bench(size, masks, device).entry()
