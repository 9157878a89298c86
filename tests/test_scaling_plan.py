"""The plan in docs/scaling.md: what its script computes, from operations and sizes that are the model's own."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from support.counting import Flops

from advvl.models.uniter.model import UniterConfig, gather_index
from advvl.tasks.uniter.pretraining import UniterForPretraining

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import scaling_plan as plan


@pytest.mark.slow
def test_the_page_holds_what_the_script_writes() -> None:
    page = plan.PAGE.read_text()
    assert plan.written(page) == page


@pytest.mark.slow
def test_a_place_that_is_missing_is_named() -> None:
    with pytest.raises(SystemExit, match="one place for the table 'memory'"):
        plan.written("a page")


def test_the_operations_are_those_of_a_forward() -> None:
    """Counted on a small UNITER of the plan's lengths; what it leaves out, pooler and boxes, is under a per cent."""
    config = UniterConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=500,
        attn_implementation="eager",
    )
    model, rows = UniterForPretraining(config).eval(), 2
    words, regions = torch.full((rows,), plan.WORDS), torch.full((rows,), plan.REGIONS)
    labels = torch.full((rows, plan.WORDS), -1)
    labels[:, : round(plan.MASKED * plan.WORDS)] = 7
    with torch.no_grad(), Flops() as counted:
        model(
            task="mlm",
            txt_labels=labels,
            input_ids=torch.ones(rows, plan.WORDS, dtype=torch.long),
            img_feat=torch.zeros(rows, plan.REGIONS, config.img_dim),
            img_pos_feat=torch.zeros(rows, plan.REGIONS, 7),
            attn_masks=torch.ones(rows, plan.WORDS + plan.REGIONS, dtype=torch.long),
            gather_index=gather_index(words, regions, plan.WORDS),
        )
    assert math.isclose(plan.forward_flops(config) * rows, counted.total, rel_tol=0.01)


def test_the_sizes_are_those_of_the_published_model() -> None:
    config, parameters = plan.sizes()
    assert round(parameters / 1e6, 1) == 340.5
    assert (config.num_hidden_layers, config.hidden_size) == (24, 1024)
    assert plan.TOKENS == 393_216


def test_every_update_costs_what_the_algebra_says() -> None:
    """In forwards, of which a backward is two and one towards the perturbations alone is one."""
    units = {name: method.units for name, method in plan.METHODS.items()}
    assert units == {"fresh": 21, "shared": 16, "together": 12, "together, shared": 10, "freelb": 9, "plain": 3}
