"""A small training script, as its user would write it, for the launchers: `launched.py torchrun|accelerate|dies FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from advvl import adapt
from advvl.runtime.processes import check_agreement, process_index
from support.distributed_cases import ROWS, gradients, method_of, model_of, part
from support.spawn import leave
from support.toy import toy_batch, toy_sites

EXAMPLES = 7


def by_hand(how: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(model_of())
    target, method = adapt(model, toy_sites()), method_of("villa")
    check_agreement("the method", method)
    if how == "dies" and process_index() == 1:
        os._exit(3)
    method.step(target, part(toy_batch(ROWS)))
    return {"gradients": gradients(model)}


def with_accelerate() -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(torch.arange(EXAMPLES), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    reductions: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        reductions.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    target, method = adapt(model, toy_sites()), method_of("villa")
    for seed in range(2):
        with accelerator.accumulate(model):
            method.step(target, part(toy_batch(ROWS, seed=seed)), backward=accelerator.backward)
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    numbers = torch.cat([accelerator.gather_for_metrics(batch) for batch in loader])
    return {
        "gradients": found,
        "reductions": reductions,
        "numbers": numbers.tolist(),
        "parameters": model.module.state_dict(),
    }


if __name__ == "__main__":
    how, folder = sys.argv[1], Path(sys.argv[2])
    found = with_accelerate() if how == "accelerate" else by_hand(how)
    torch.save(found, folder / f"{process_index()}.pt")
    leave()
