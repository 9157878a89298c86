"""What processes know of each other: means over all of them, what each found, that they agree; and when one is gone."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed_cases import model_of, part
from support.spawn import shared_results, spawn
from support.toy import toy_batch, toy_sites
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import advvl
from advvl import Adapter
from advvl.errors import ConfigurationError, NonFiniteError
from advvl.evaluation.robustness import RobustnessCurve, WorstCase, clean_scores, robustness_curve
from advvl.runtime.processes import _differing, check_agreement, collected, global_mean, process_mean, share

TIMEOUT = 4.0  # of a collective, where a process is gone


def test_one_process_is_its_own_mean_and_agrees_with_itself() -> None:
    value = torch.rand(3, requires_grad=True)
    assert torch.equal(process_mean(value), value)
    assert not process_mean(value).requires_grad
    assert share(torch.tensor(5)) == 1
    assert collected({3: "c", 1: "a"}) == {1: "a", 3: "c"}
    assert list(collected({3: "c", 1: "a"})) == [1, 3]
    check_agreement("anything", object())


def test_the_global_mean_is_that_of_what_counts() -> None:
    losses = torch.tensor([1.0, torch.inf, 5.0], requires_grad=True)
    assert global_mean(losses, torch.tensor([True, False, True])) == 3
    assert torch.equal(global_mean(losses, torch.tensor([3, 0, 1])), torch.tensor(2.0))
    nothing = global_mean(losses, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0
    assert torch.equal(losses.grad, torch.zeros(3))  # type: ignore[arg-type]


def test_of_long_values_the_difference_is_shown() -> None:
    one, other = (f"{'a' * 500}step_size={size}{'b' * 500}" for size in (0.1, 0.25))
    here, there = _differing(one, other)
    assert "step_size=0.1b" in here
    assert "step_size=0.25b" in there
    assert here[0] == here[-1] == "…"
    assert len(here) < 160
    assert _differing("a" * 300, "a" * 300 + "b") == ("…" + "a" * 60, "…" + "a" * 60 + "b")
    assert _differing("short", "other") == ("short", "other")


@pytest.mark.parametrize("clamped", [False, True])
def test_a_process_without_entries_needs_a_loss_of_zero(clamped: bool) -> None:
    """A plain mean over none of them is not a number, whatever it is multiplied by."""
    target, batch = model(), part(toy_batch(4))
    ignored = torch.full((4,), -100)
    count = (ignored != -100).sum()

    def loss(outputs: Any, batch: Any) -> Tensor:
        if not clamped:
            return nn.functional.cross_entropy(outputs["logits"], ignored)
        return nn.functional.cross_entropy(outputs["logits"], ignored, reduction="sum") / count.clamp(min=1)

    weight = share(count)
    assert weight == 1
    with nullcontext() if clamped else pytest.raises(NonFiniteError, match="expected finite losses"):
        report = advvl.freelb(step_sizes={"text": 0.1}).step(
            target, batch, loss=loss, backward=lambda loss: (weight * loss).backward()
        )
        assert report.loss == 0
        assert all(not p.grad.any() for p in target.model.parameters() if p.grad is not None)


def worker(rank: int, folder: Path) -> dict[str, Any]:
    del folder
    counts = torch.tensor([3.0, 1.0])[rank]
    value = torch.full((2,), float(rank), requires_grad=True)
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])[rank][: int(counts)].requires_grad_()
    global_mean(losses).backward()
    found: dict[str, Any] = {
        "mean": process_mean(value),
        "shares": [share(counts), share(torch.tensor([4, 0])[rank]), share(torch.tensor(0))],
        "gradient": losses.grad,
        "collected": collected({number: number**2 for number in range(rank, 7, 2)} | {6: 36}),
    }
    start = torch.zeros(2, 5000)
    start[1, 2500] = rank  # where a repr shows nothing
    for what, ours in (
        ("steps", 3),
        ("an object", object()),
        ("the method", advvl.villa(step_sizes={"text": 1e-3 * (1 + rank)})),
        ("the start", advvl.Given(start)),
    ):
        try:
            check_agreement(what, ours)
        except ConfigurationError as error:
            found[what] = str(error)
    check_agreement("the method", advvl.villa())
    found["curve"] = vars(curve(over_processes=True))
    found["clean"] = clean_scores(model(), batches(), targets=answers, over_processes=True)
    target = Adapter(DistributedDataParallel(model_of()), toy_sites())
    try:
        clean_scores(target, batches(), targets=answers, over_processes=True)
    except ConfigurationError as error:
        found["wrapped"] = str(error)
    return found


def batches() -> list[dict[str, Tensor]]:
    """Eleven examples in five batches, of which two processes take three and two."""
    whole = toy_batch(11)
    return [{name: value[rows : rows + 2 + rows // 6] for name, value in whole.items()} for rows in (0, 2, 4, 6, 9)]


def model() -> Adapter:
    return Adapter(model_of(), toy_sites())


def answers(batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.one_hot(batch["labels"], 4).double()


def curve(**options: Any) -> RobustnessCurve:
    attacks = WorstCase(steps=1, step_fraction=0.05, restarts=2)  # of which the random starts decide
    return robustness_curve(
        model(),
        batches(),
        modality="image",
        radii=tuple(0.25 * n for n in range(1, 17)),
        attacks=attacks,
        targets=answers,
        **options,
    )


two = shared_results("runtime.test_processes:worker", 2)


@pytest.mark.slow
def test_means_and_shares_are_those_of_all_processes(two: list[dict[str, Any]]) -> None:
    assert all(torch.equal(found["mean"], torch.full((2,), 0.5)) for found in two)
    assert [float(found["shares"][0]) for found in two] == [1.5, 0.5]
    assert [float(found["shares"][1]) for found in two] == [2.0, 1.0]  # one has none
    assert [float(found["shares"][2]) for found in two] == [1.0, 1.0]  # none has any


@pytest.mark.slow
def test_the_average_gradient_of_the_global_mean_is_that_of_all_entries(two: list[dict[str, Any]]) -> None:
    for found in two:
        torch.testing.assert_close(found["gradient"] / 2, torch.full_like(found["gradient"], 1 / 4))


@pytest.mark.slow
def test_what_processes_found_is_collected_once_and_in_order(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert list(found["collected"].items()) == [(number, number**2) for number in range(7)]


@pytest.mark.slow
def test_processes_that_disagree_all_raise(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "steps" not in found
        assert "an object" not in found, "its repr has its address"
        assert "expected the start to be the same" in found["the start"]
        assert "expected the method to be the same in all 2 processes" in found["the method"]
        assert "step_size=0.001" in found["the method"]
        assert "step_size=0.002" in found["the method"]


@pytest.mark.slow
def test_a_robustness_curve_over_processes_is_that_of_one(two: list[dict[str, Any]]) -> None:
    expected = curve()
    assert len(expected.clean) == 11
    assert not torch.equal(expected.scores, curve(seed=1).scores)
    for found in two:
        assert torch.equal(found["curve"]["clean"], expected.clean)
        assert torch.equal(found["clean"], expected.clean)
        assert torch.equal(found["curve"]["scores"], expected.scores)


@pytest.mark.slow
def test_an_evaluation_over_processes_refuses_a_model_that_waits_for_the_others(two: list[dict[str, Any]]) -> None:
    assert "target.through(model.module)" in two[0]["wrapped"]


def dying(how: str, rank: int) -> None:
    """A step in whose second pass process 1 leaves, raises or does nothing any more."""
    calls = 0

    def loss(outputs: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            if how == "leaves":
                os._exit(3)
            if how == "hangs":
                time.sleep(3 * TIMEOUT)
                os._exit(3)
            raise ValueError("no such example")
        found: Tensor = outputs["loss"]
        return found

    target = Adapter(DistributedDataParallel(model_of()), toy_sites())
    for _ in range(2):
        advvl.villa(step_sizes={"text": 0.1}).step(target, part(toy_batch(4)), loss=loss)


def leaves(rank: int, folder: Path) -> None:
    dying("leaves", rank)


def hangs(rank: int, folder: Path) -> None:
    dying("hangs", rank)


def raises(rank: int, folder: Path) -> None:
    dying("raises", rank)


def never_asks(rank: int, folder: Path) -> None:
    """Process 1 does not come to the question whether they agree."""
    if rank == 1:
        time.sleep(3 * TIMEOUT)
        os._exit(3)
    check_agreement("the method", advvl.villa())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leaves", "hangs", "raises", "never_asks"])
def test_when_one_is_gone_the_others_end_with_an_error(how: str, tmp_path: Path) -> None:
    left, gone = spawn(f"runtime.test_processes:{how}", 2, tmp_path, limit=60, timeout=TIMEOUT)
    assert gone.code in (1, 3)
    assert left.code == 1, left
    assert "RuntimeError" in left.output or "DistBackendError" in left.output
