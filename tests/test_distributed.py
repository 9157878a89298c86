"""Over processes: the gradient of the concatenated batch, for one reduction an update."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

PROCESSES = 2
ROWS = 4
METHODS = ["freelb", "villa", "villa-shared", "villa-in-turn", "villa-detached", "pgd", "free_at"]


def method_of(name: str):  # type: ignore[no-untyped-def]
    import advvl

    sizes = {"text": 0.3, "image": 0.5}
    if name == "freelb":
        return advvl.freelb(step_sizes=sizes)
    if name == "villa":
        return advvl.villa(step_sizes=sizes, clean_weight=0.5)
    if name == "villa-shared":
        return advvl.villa(step_sizes=sizes, dropout="shared")
    if name == "villa-in-turn":
        return advvl.villa(step_sizes=sizes, modalities="in turn")
    if name == "villa-detached":
        parts = advvl.villa(step_sizes=sizes)
        return advvl.AdversarialTraining(parts.perturber, parts.maximizer, advvl.KL(detach_clean=True))
    if name == "pgd":
        ascent = advvl.Ascent(advvl.L2(0.5), step_size=0.2)
        return advvl.AdversarialTraining(advvl.EmbeddingPerturber(image=ascent), advvl.PGD(3))
    ascent = advvl.Ascent(advvl.Linf(0.2), step_size=0.2)
    return advvl.AdversarialTraining(advvl.EmbeddingPerturber(image=ascent), advvl.FreeAT(2, carry=False))


class Task(torch.nn.Module):
    """A model with the wrapper inside it, where a step does not see its `no_sync`."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **fields: torch.Tensor) -> object:
        return self.backbone(**fields)


def one_step(name: str, target, batch, **options):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)

    def update() -> None:
        optimizer.step()
        if name == "free_at":
            optimizer.zero_grad()

    method_of(name).step(target, batch, update=update, **options)
    return {
        n.removeprefix("backbone.").removeprefix("module."): p.detach().clone()
        for n, p in target.model.named_parameters()
    }


def worker(rank: int, folder: str) -> None:
    """One process: every method's parameters after one update, and the reductions that it took."""
    from conftest import ToyModel, toy_batch, toy_sites

    from advvl import Adapter

    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=PROCESSES, timeout=datetime.timedelta(seconds=60)
    )
    whole = toy_batch(rows=ROWS * PROCESSES)
    mine = {key: value[rank * ROWS : (rank + 1) * ROWS] for key, value in whole.items()}
    reductions = {}
    for name in METHODS:
        torch.manual_seed(0)
        wrapped = DistributedDataParallel(ToyModel().double())
        counts: list[int] = []

        def count(state, bucket, counts=counts):  # type: ignore[no-untyped-def]
            counts.append(bucket.index())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, count)
        parameters = one_step(name, Adapter(wrapped, toy_sites()), mine)
        reductions[name] = len(counts)
        if rank == 0:
            torch.save(parameters, f"{folder}/{name}.pt")
    torch.manual_seed(0)
    inside = {m: replace(site, module=f"backbone.{site.module}") for m, site in toy_sites().items()}
    parameters = one_step("villa", Adapter(Task(DistributedDataParallel(ToyModel().double())), inside), mine)
    torch.save(parameters, f"{folder}/inside{rank}.pt")
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(ToyModel().double())
    parameters = one_step("villa", Adapter(wrapped, toy_sites()), mine, sync=nullcontext)
    torch.save(parameters, f"{folder}/nullcontext{rank}.pt")
    accumulating = DistributedDataParallel(ToyModel().double())
    with accumulating.no_sync():
        method_of("villa").step(Adapter(accumulating, toy_sites()), mine)
    torch.save({n: p.grad for n, p in accumulating.module.named_parameters()}, f"{folder}/local{rank}.pt")
    if rank == 0:
        Path(folder, "reductions.json").write_text(json.dumps(reductions))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Path:
    """What the processes wrote."""
    with tempfile.TemporaryDirectory() as name:
        here = str(Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "import sys, test_distributed as t; t.worker(int(sys.argv[1]), sys.argv[2])"]
        processes = [
            subprocess.Popen([*command, str(rank), name], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(PROCESSES)
        ]
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert all(process.returncode == 0 for process in processes), "\n".join(errors)
        kept = Path(name)
        yield kept  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_ddp_gives_the_gradient_of_the_concatenated_batch(folder: Path, name: str) -> None:
    from conftest import ToyModel, toy_batch, toy_sites

    from advvl import Adapter

    torch.manual_seed(0)
    expected = one_step(name, Adapter(ToyModel().double(), toy_sites()), toy_batch(rows=ROWS * PROCESSES))
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["inside", "nullcontext"])
def test_a_wrapper_that_no_pass_is_held_back_from_gives_it_too(folder: Path, case: str) -> None:
    from conftest import ToyModel, toy_batch, toy_sites

    from advvl import Adapter

    torch.manual_seed(0)
    expected = one_step("villa", Adapter(ToyModel().double(), toy_sites()), toy_batch(rows=ROWS * PROCESSES))
    for rank in range(PROCESSES):
        found = torch.load(folder / f"{case}{rank}.pt", weights_only=True)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)


def test_an_update_takes_one_reduction_a_bucket(folder: Path) -> None:
    reductions = json.loads((folder / "reductions.json").read_text())
    assert reductions == {**dict.fromkeys(METHODS, 1), "free_at": 2}  # FreeAT updates twice


def test_the_users_accumulation_wins(folder: Path) -> None:
    """Inside the user's own no_sync nothing is reduced: each process keeps the gradient of its own rows."""
    one, two = (torch.load(folder / f"local{rank}.pt", weights_only=True) for rank in range(PROCESSES))
    assert any(not torch.equal(one[key], two[key]) for key in one)
