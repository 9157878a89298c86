"""Over processes with DDP: the gradient of all rows, for one reduction an update; perturbations stay where they are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.compare import close_gradients
from support.distributed_cases import (
    CASES,
    ROWS,
    SIZES,
    CheckpointedSites,
    check,
    found_in_cases,
    gradients,
    method_of,
    model_of,
    part,
)
from support.spawn import attempt, shared_results
from support.toy import ToyModel, toy_batch, toy_sites
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import advvl
from advvl import Adapter, AdversarialTraining, AscentState, EmbeddingPerturber, FreeAT, FreeLB
from advvl.errors import AdvVLError
from advvl.passes.traces import PassTrace

pytestmark = pytest.mark.slow  # several processes

Results = list[dict[str, Any]]


class Task(nn.Module):
    """A model with the wrapper inside it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **fields: Tensor) -> object:
        return self.backbone(**fields)


def ddp(model: nn.Module, **options: Any) -> Adapter:
    return Adapter(DistributedDataParallel(model, **options), toy_sites())


def inside() -> Adapter:
    sites = {modality: replace(site, module=f"backbone.{site.module}") for modality, site in toy_sites().items()}
    return Adapter(Task(DistributedDataParallel(model_of())), sites)


def reduced(method: AdversarialTraining, target: Adapter, batch: dict[str, Tensor], *, steps: int = 1) -> list[int]:
    """The buckets that the last of some steps reduced, in order; an all-reduce of anything else is a -1."""
    calls: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and not as strings
        future = allreduce_hook(state, bucket)
        calls[-1] = bucket.index()
        return future

    def count(*args: Any, **options: Any) -> Any:
        calls.append(-1)
        return all_reduce(*args, **options)

    wrapper = next(module for module in target.model.modules() if isinstance(module, DistributedDataParallel))
    wrapper.register_comm_hook(None, hook)
    all_reduce, dist.all_reduce = dist.all_reduce, count
    try:
        for _ in range(steps):
            calls.clear()
            method.step(target, batch)
    finally:
        dist.all_reduce = all_reduce
    return calls


def with_bitmap(method: AdversarialTraining, target: Adapter, batch: dict[str, Tensor]) -> int:
    """All-reduces of a step, DDP's own among them."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        method.step(target, batch)
    return sum(event.name == "gloo:all_reduce" for event in seen.events())


def every_kind(batch: dict[str, Tensor]) -> dict[str, list[int]]:
    """The reductions of FreeLB and VILLA of every kind."""
    found = {}
    for steps, divergence, order, masks in itertools.product(
        range(1, 6), (False, True), ("together", "in turn"), ("fresh", "shared")
    ):
        start = advvl.Uniform(0.1) if steps == 1 else advvl.Zero()  # FreeLB refuses one pass at zero
        ascents = {m: advvl.Ascent(advvl.L2(), step_size=size, start=start) for m, size in SIZES.items()}
        regularizer = advvl.SymmetricKL(1.5) if divergence else None
        method = AdversarialTraining(
            EmbeddingPerturber(**ascents),
            FreeLB(steps, order),  # type: ignore[arg-type]
            regularizer,
            dropout=masks,  # type: ignore[arg-type]
        )
        for unused in (False, True) if steps == 3 else (False,):
            target = ddp(ToyModel(dropout=0.1).double(), find_unused_parameters=unused)
            name = f"{'VILLA' if divergence else 'FreeLB'}, K={steps}, {order}, {masks}, {unused}"
            found[name] = reduced(method, target, batch)
    return found


def perturbations(rank: int) -> dict[str, Tensor]:
    """Last perturbations of a step: of this process's rows; and of equal rows, with starts seeded alike and by rank."""
    random = {m: advvl.Ascent(advvl.L2(), step_size=size, start=advvl.Uniform(0.1)) for m, size in SIZES.items()}
    method = AdversarialTraining(EmbeddingPerturber(**random), FreeLB(2))
    found = {}
    for name, batch, seed in (
        ("own", part(toy_batch(ROWS)), 0),
        ("alike", toy_batch(2), 0),
        ("by rank", toy_batch(2), rank),
    ):
        passes: list[PassTrace] = []
        generator = torch.Generator().manual_seed(seed)
        method.step(ddp(model_of()), batch, generator=generator, trace=passes.append)
        found[name] = passes[-1].deltas["image"]
    ascent = advvl.Ascent(advvl.Linf(0.2), step_size=0.2)
    state, target = AscentState(), ddp(model_of())
    free = AdversarialTraining(EmbeddingPerturber(image=ascent), FreeAT(2))
    free.step(target, part(toy_batch(ROWS)), state=state, update=target.model.zero_grad)
    return found | {"carried": state.state_dict()["deltas"]["image"]}


def refused(batch: dict[str, Tensor]) -> str:
    try:
        method_of("villa").step(ddp(CheckpointedSites().double()), batch)
    except AdvVLError as error:
        return str(error)
    return "nothing"


def reduced_and_gradients(target: Adapter, batch: dict[str, Tensor]) -> tuple[list[int], dict[str, Tensor]]:
    return reduced(method_of("villa"), target, batch), gradients(target.model)


def quiet(batch: dict[str, Tensor]) -> tuple[list[int], dict[str, Tensor]]:
    target = ddp(model_of())
    with target.model.no_sync():  # type: ignore[operator]
        return reduced_and_gradients(target, batch)


def worker(rank: int, folder: Path) -> dict[str, Any]:
    batch = part(toy_batch(ROWS))
    mine = {
        "inside": lambda: reduced_and_gradients(inside(), batch),
        "kinds": lambda: every_kind(batch),
        "buckets": lambda: reduced(method_of("villa"), ddp(model_of(), bucket_cap_mb=1e-4), batch, steps=2),
        "bitmap": lambda: with_bitmap(method_of("villa"), ddp(model_of(), find_unused_parameters=True), batch),
        "quiet": lambda: quiet(batch),
        "perturbations": lambda: perturbations(rank),
        "refused": lambda: refused(batch),
        "compiled": compiled,
    }
    return cases(rank, folder) | {name: attempt(run) for name, run in mine.items()}


def compiled() -> dict[str, Tensor]:
    """A step of a model that is compiled after it was wrapped, as accelerate does it."""
    model = model_of()
    target = Adapter(model, toy_sites())
    wrapped: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    advvl.villa(step_sizes=SIZES, steps=2).step(target.through(wrapped), part(toy_batch(ROWS)))
    return gradients(wrapped)


two = shared_results("passes.test_distributed:worker", 2)
four = shared_results("passes.test_distributed:cases", 4)


def cases(rank: int, folder: Path) -> dict[str, Any]:
    del rank, folder
    return found_in_cases(DistributedDataParallel)


@pytest.mark.parametrize("processes", ["two", "four"])
@pytest.mark.parametrize("case", CASES)
def test_ddp_gives_what_one_process_gives_on_all_rows(
    processes: str, case: str, request: pytest.FixtureRequest
) -> None:
    for found in request.getfixturevalue(processes):
        check(case, found[case])


def test_a_wrapper_inside_the_model_reduces_once_too(two: Results) -> None:
    expected = Adapter(model_of(), toy_sites())
    method_of("villa").step(expected, toy_batch(ROWS))
    for found in two:
        counts, gradient = found["inside"]
        assert counts == [0]
        close_gradients(gradient, gradients(expected.model))


def test_an_update_of_any_kind_takes_one_reduction(two: Results) -> None:
    kinds = two[0]["kinds"]
    assert len(kinds) == 48
    assert kinds == {name: [0] for name in kinds}


def test_an_update_takes_one_reduction_of_each_bucket(two: Results) -> None:
    buckets = two[0]["buckets"]
    assert len(buckets) > 3
    assert buckets == list(range(len(buckets)))


def test_parameters_looked_for_take_one_more_for_their_bitmap(two: Results) -> None:
    assert two[0]["bitmap"] == 2


def test_the_users_accumulation_wins(two: Results) -> None:
    """Inside the user's own no_sync nothing is reduced: each process keeps the gradient of its own rows."""
    for rank, found in enumerate(two):
        counts, gradient = found["quiet"]
        assert counts == []
        alone = Adapter(model_of(), toy_sites())
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        method_of("villa").step(alone, {name: value[rows] for name, value in toy_batch(ROWS).items()})
        close_gradients(gradient, gradients(alone.model))


def test_perturbations_and_their_state_stay_in_their_process(two: Results) -> None:
    """Processes with other rows have other ones; with equal rows, they differ if each seeds its starts by its rank."""
    one, other = (found["perturbations"] for found in two)
    assert not torch.equal(one["own"], other["own"])
    assert not torch.equal(one["carried"], other["carried"])
    assert torch.equal(one["alike"], other["alike"])
    assert not torch.equal(one["by rank"], other["by rank"])


def test_a_site_that_is_computed_again_is_refused_beside_a_live_clean_branch(two: Results) -> None:
    assert "outside any activation-checkpointed region" in two[0]["refused"]


def test_a_compiled_model_trains_too(two: Results) -> None:
    expected = Adapter(model_of(), toy_sites())
    advvl.villa(step_sizes=SIZES, steps=2).step(expected, toy_batch(ROWS))
    for found in two:
        close_gradients(found["compiled"], gradients(expected.model))
