"""Over processes with FSDP2: the gradient of all rows, for one reduction an update, and what it holds meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.compare import close_gradients
from support.distributed_cases import (
    CASES,
    METHODS,
    ROWS,
    CheckpointedSites,
    accumulation,
    check,
    found_in_cases,
    gradients,
    method_of,
    model_of,
    part,
)
from support.spawn import attempt, shared_results
from support.toy import toy_batch, toy_sites
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import advvl
from advvl import Adapter, AscentState, Attack, EmbeddingPerturber
from advvl.errors import ConfigurationError

pytestmark = pytest.mark.slow  # several processes

Results = list[dict[str, Any]]
GROUPS = 4  # of parameters: the words with their site, two layers, and the rest


def sharded(model: nn.Module, **options: Any) -> FSDPModule:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("words", "mix", "head"):
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def target_of(**options: Any) -> Adapter:
    return Adapter(sharded(model_of(), **options), toy_sites())  # type: ignore[arg-type]


class Several(nn.Module):
    """Parts that are sharded each by itself; a loss uses one that the logits do not."""

    def __init__(self) -> None:
        super().__init__()
        toy = model_of()
        self.words, self.body, self.first, self.second = toy.words, toy.mix, toy.head, toy.query

    def forward(self, ids: Tensor, labels: Tensor, **others: Tensor) -> dict[str, Tensor]:
        hidden = self.body(self.words(ids)).tanh().mean(1)
        logits, guess = self.first(hidden), self.second(hidden).squeeze(-1)
        loss = nn.functional.cross_entropy(logits, labels, reduction="none") + (guess - labels).square()
        return {"logits": logits, "loss": loss}


def several(name: str, wrap: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    model = Several()
    for child in model.children():
        wrap(child)
    target = Adapter(model, {"text": "words"})
    ascent = advvl.Ascent(advvl.L2(), step_size=0.3)
    method = replace(method_of(name), perturber=EmbeddingPerturber(text=ascent))
    method.step(target, part(toy_batch(ROWS)))
    return gradients(model)


class Collectives(TorchDispatchMode):
    """Counts what is sent to other processes, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def scatters(step: Callable[[], object]) -> int:
    """Reduce-scatters that a step makes; an all-reduce would be one too many."""
    with Collectives() as seen:
        step()
    assert set(seen.counts) <= {"_allgather_base_", "_reduce_scatter_base_"}, seen.counts
    return seen.counts["_reduce_scatter_base_"]


def scatters_of(name: str) -> int:
    target = target_of()
    method, batch = method_of(name), part(toy_batch(ROWS))
    return scatters(lambda: method.step(target, batch, update=target.model.zero_grad))


def unsharded_bytes(model: Any) -> int:
    """What FSDP2 holds of gradients that are not reduced yet."""
    held = 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    grad = getattr(parameter, "_unsharded_param", None)
                    grad = None if grad is None else grad.grad
                    grad = parameter.unsharded_accumulated_grad if grad is None else grad
                    held += 0 if grad is None else grad.numel() * grad.element_size()
    return held


def held(**options: Any) -> list[int]:
    """Bytes of gradients that wait for their reduction, after each pass of a step."""
    target, after = target_of(**options), list[int]()
    method_of("villa").step(target, part(toy_batch(ROWS)), trace=lambda _: after.append(unsharded_bytes(target.model)))
    return after


def attacked(rank: int) -> dict[str, Tensor]:
    ascent = advvl.Ascent(advvl.L2(0.5), step_size=0.2)
    attack = Attack(EmbeddingPerturber(image=ascent), advvl.PGD(3))
    target = target_of()
    result = attack(target, part(toy_batch(ROWS)))
    assert all(p.grad is None for p in target.model.parameters())
    return {"deltas": result.deltas["image"], "losses": result.losses}  # type: ignore[dict-item]


def refused() -> str:
    target = target_of()
    with accumulation(target.model):
        try:
            method_of("free_at").step(target, part(toy_batch(ROWS)), state=AscentState(), update=lambda: None)
        except ConfigurationError as error:
            return str(error)
    return "nothing"


def accumulated_scatters() -> list[int]:
    """Of two steps, the first within the user's own accumulation."""
    target, method, batch = target_of(), method_of("villa-shared"), part(toy_batch(ROWS))
    with accumulation(target.model):
        first = scatters(lambda: method.step(target, batch))
    return [first, scatters(lambda: method.step(target, batch))]


def each(module: nn.Module) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


SEVERAL = ["freelb", "villa", "villa-shared", "villa-in-turn", "villa-detached"]


def checkpointed_sites() -> dict[str, Tensor]:
    torch.manual_seed(0)
    site = Adapter(sharded(CheckpointedSites().double()), toy_sites())  # type: ignore[arg-type]
    method_of("villa").step(site, part(toy_batch(ROWS)))
    return gradients(site.model)


def adapted_before() -> dict[str, Tensor]:
    late = model_of()
    target = Adapter(late, toy_sites())
    method_of("villa").step(target.through(sharded(late, reshard_after_forward=False)), part(toy_batch(ROWS)))  # type: ignore[arg-type]
    return gradients(late)


def worker(rank: int, folder: Path) -> dict[str, Any]:
    mine = {
        "scatters": lambda: {name: scatters_of(name) for name in METHODS},
        "accumulated scatters": accumulated_scatters,
        "held": held,
        "held, in half": lambda: held(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
        "attacked": lambda: attacked(rank),
        "refused": refused,
        **{f"several, {name}": partial(several, name, each) for name in SEVERAL},
        "checkpointed sites": checkpointed_sites,
        "adapted before": adapted_before,
    }
    return cases(rank, folder) | {name: attempt(run) for name, run in mine.items()}


def cases(rank: int, folder: Path) -> dict[str, Any]:
    del rank, folder
    return found_in_cases(sharded)


two = shared_results("passes.test_fsdp:worker", 2)
four = shared_results("passes.test_fsdp:cases", 4)


@pytest.mark.parametrize("processes", ["two", "four"])
@pytest.mark.parametrize("case", CASES)
def test_fsdp_gives_what_one_process_gives_on_all_rows(
    processes: str, case: str, request: pytest.FixtureRequest
) -> None:
    for found in request.getfixturevalue(processes):
        check(case, found[case])


def test_an_update_takes_one_reduction_of_each_group(two: Results) -> None:
    """FreeAT updates twice; its words, which are not perturbed, are in every group's reduction all the same."""
    assert two[0]["scatters"] == {**dict.fromkeys(METHODS, GROUPS), "free_at": 2 * GROUPS}


def test_the_users_accumulation_wins_and_is_left_as_found(two: Results) -> None:
    assert two[0]["accumulated scatters"] == [0, GROUPS]


def test_whole_gradients_are_held_between_passes_in_the_precision_of_their_reduction(two: Results) -> None:
    """Nothing after the clean pass, all of them after each perturbed one, nothing after the update."""
    parameters = sum(p.numel() for p in model_of().parameters())
    assert two[0]["held"] == [0, 8 * parameters, 8 * parameters, 0]
    assert two[0]["held, in half"] == [0, 4 * parameters, 4 * parameters, 0]


def test_an_attack_on_a_sharded_model_finds_what_it_finds_on_a_whole_one(two: Results) -> None:
    ascent = advvl.Ascent(advvl.L2(0.5), step_size=0.2)
    expected = Attack(EmbeddingPerturber(image=ascent), advvl.PGD(3))(Adapter(model_of(), toy_sites()), toy_batch(ROWS))
    found = {name: torch.cat([one["attacked"][name] for one in two]) for name in ("deltas", "losses")}
    close_gradients(found, {"deltas": expected.deltas["image"], "losses": expected.losses})  # type: ignore[dict-item]


def test_free_at_refuses_to_accumulate(two: Results) -> None:
    assert "expected no gradient accumulation with 2 updates" in two[0]["refused"]


def test_a_model_may_be_adapted_before_it_is_sharded(two: Results) -> None:
    expected = Adapter(model_of(), toy_sites())
    method_of("villa").step(expected, toy_batch(ROWS))
    close_gradients(two[0]["adapted before"], gradients(expected.model))


def test_a_site_that_is_computed_again_finds_its_own_graphs_perturbation(two: Results) -> None:
    """As it does in one process: each graph has a backward of its own."""
    expected = Adapter(model_of(), toy_sites())
    method_of("villa").step(expected, toy_batch(ROWS))
    close_gradients(two[0]["checkpointed sites"], gradients(expected.model))


@pytest.mark.parametrize("name", SEVERAL)
def test_parts_that_are_sharded_each_by_itself_are_all_reduced(name: str, two: Results) -> None:
    """Also one that the clean graph does not reach, whose backward is the last."""
    for found in two:
        close_gradients(found[f"several, {name}"], several(name, lambda module: None))
