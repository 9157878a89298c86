"""One process of several that train together: times its updates, with and without the reduction of gradients.

Run by `spawn`, which gives it its rank and a folder with `case.json`; it imports nothing of the other benchmarks.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import advvl
from advvl import adapt
from advvl.models.uniter.model import UniterConfig, gather_index
from advvl.runtime.processes import process_count
from advvl.tasks.uniter.vqa import UniterForVQA

WORDS, REGIONS, ANSWERS = 20, 36, 100


def batch(config: UniterConfig, rows: int) -> dict[str, torch.Tensor]:
    words, regions = torch.full((rows,), WORDS), torch.full((rows,), REGIONS)
    return {
        "input_ids": torch.randint(1, config.vocab_size, (rows, WORDS)),
        "img_feat": torch.randn(rows, REGIONS, config.img_dim),
        "img_pos_feat": torch.rand(rows, REGIONS, 7),
        "attn_masks": torch.ones(rows, WORDS + REGIONS, dtype=torch.long),
        "gather_index": gather_index(words, regions, WORDS),
        "targets": torch.rand(rows, ANSWERS),
    }


def timed(rank: int, folder: Path) -> dict[str, Any]:
    """Seconds of each round, of the slowest process: updates that reduce, and the same ones that do not."""
    case = json.loads((folder / "case.json").read_text())
    torch.manual_seed(0)
    model = UniterForVQA(UniterConfig(**case["config"]), num_answers=ANSWERS).train()
    wrapped = DistributedDataParallel(model)
    method = advvl.villa(step_sizes={"text": 1e-3, "image": 1e-3}, steps=case["steps"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    torch.manual_seed(rank)
    inputs = batch(model.config, case["rows"])
    alone = adapt(model)
    lanes = {"reducing": alone.through(wrapped), "without communication": alone}

    def update(name: str) -> float:
        dist.barrier()
        start = time.perf_counter()
        method.step(lanes[name], inputs)
        optimizer.step()
        optimizer.zero_grad()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)  # all end together
        return float(seconds)

    for name in [*lanes, *lanes]:
        update(name)
    found: dict[str, list[float]] = {name: [] for name in lanes}
    draw = random.Random(0)
    for _ in range(case["rounds"]):
        for name in draw.sample(list(lanes), len(lanes)):
            found[name].append(update(name))
    assert all(p.isfinite().all() for p in model.parameters())
    size = sum(p.numel() for p in model.parameters())
    return {"seconds": found, "parameters": size, "processes": process_count()}
