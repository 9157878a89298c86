"""BertAdam against the rule written out in plain numbers, its schedule, and that it goes on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from advvl.errors import ConfigurationError
from advvl.fit.bert_adam import BertAdam, warmup_linear
from advvl.fit.options import OptimizerOptions
from advvl.fit.schedules import schedule


def oracle(
    start: list[float],
    gradients: list[list[float | None]],
    *,
    lrs: list[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    decay: float = 0.01,
) -> list[float]:
    """One scalar at a time in float64: no bias correction, decay inside the update, nothing without a gradient."""
    found = []
    for place, value in enumerate(start):
        mean = square = 0.0
        for lr, row in zip(lrs, gradients, strict=True):
            gradient = row[place]
            if gradient is None:
                continue
            mean = betas[0] * mean + (1 - betas[0]) * gradient
            square = betas[1] * square + (1 - betas[1]) * gradient**2
            value -= lr * (mean / (math.sqrt(square) + eps) + decay * value)
        found.append(value)
    return found


def scalars(values: list[float]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in values]


def give(parameters: list[nn.Parameter], row: list[float | None]) -> None:
    for parameter, gradient in zip(parameters, row, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)


NUMBERS = st.floats(-1e3, 1e3)
ROWS = st.integers(1, 4).flatmap(
    lambda width: st.tuples(
        st.lists(NUMBERS, min_size=width, max_size=width),
        st.lists(st.lists(st.none() | NUMBERS, min_size=width, max_size=width), min_size=1, max_size=6),
    )
)


@pytest.mark.slow
@settings(deadline=None)
@given(ROWS, st.floats(0, 1), st.floats(0, 0.5), st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)))
def test_it_is_the_rule_written_out(
    case: tuple[list[float], list[list[float | None]]], lr: float, decay: float, betas: tuple[float, float]
) -> None:
    start, gradients = case
    parameters = scalars(start)
    optimizer = BertAdam(parameters, lr, betas=betas, weight_decay=decay)
    for row in gradients:
        give(parameters, row)
        optimizer.step()
    expected = oracle(start, gradients, lrs=[lr] * len(gradients), betas=betas, decay=decay)
    np.testing.assert_allclose([p.item() for p in parameters], expected, rtol=1e-12, atol=1e-12)


def test_its_defaults_are_lxmerts() -> None:
    optimizer = BertAdam(scalars([1.0]), 5e-5)
    assert optimizer.defaults == {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}


def test_a_first_move_is_not_corrected_for_bias() -> None:
    """Adam's own would be of length lr; without correction it is (1 − b₁)/√(1 − b₂) of that."""
    (parameter,) = parameters = scalars([0.0])
    give(parameters, [7.0])
    BertAdam(parameters, 1.0, eps=1e-30).step()
    np.testing.assert_allclose(parameter.item(), -0.1 / math.sqrt(0.001), rtol=1e-12)


def test_it_decays_biases_and_normalisations_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    nn.init.ones_(model[0].bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    BertAdam(model.parameters(), 0.5).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.01))


def test_groups_have_options_of_their_own() -> None:
    first, second = parameters = scalars([1.0, 1.0])
    optimizer = BertAdam([{"params": [first], "weight_decay": 0.0}, {"params": [second], "lr": 0.0}], 0.1)
    give(parameters, [1.0, 1.0])
    optimizer.step()
    np.testing.assert_allclose(first.item(), oracle([1.0], [[1.0]], lrs=[0.1], decay=0.0)[0], rtol=1e-12)
    assert second.item() == 1.0


def test_a_closure_is_run_with_gradients() -> None:
    (parameter,) = parameters = scalars([3.0])
    optimizer = BertAdam(parameters, 0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert optimizer.step(closure) == 9.0
    np.testing.assert_allclose(parameter.item(), oracle([3.0], [[6.0]], lrs=[0.1])[0], rtol=1e-12)


def training(updates: int = 8) -> Iterator[tuple[nn.Module, BertAdam, torch.optim.lr_scheduler.LambdaLR]]:
    """A run on fixed data, from update to update."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = BertAdam(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: warmup_linear(update, updates, 0.25))
    yield model, optimizer, scheduler
    for update in range(updates):
        advance(model, optimizer, scheduler, update)
        yield model, optimizer, scheduler


def advance(model: nn.Module, optimizer: BertAdam, scheduler: torch.optim.lr_scheduler.LambdaLR, update: int) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(update))
    model(x).square().mean().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_resumed_it_ends_at_the_same_bits(tmp_path: Path) -> None:
    *_, (whole, _, _) = training()
    run = training()
    for _ in range(4):
        model, optimizer, scheduler = next(run)
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(kept, tmp_path / "kept.pt")
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    model, optimizer, scheduler = next(training())
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    scheduler.load_state_dict(kept["scheduler"])
    for update in range(3, 8):
        advance(model, optimizer, scheduler, update)
    assert torch.equal(weights(model), weights(whole))


def test_the_schedule_rises_from_zero_and_falls_to_it() -> None:
    found = [warmup_linear(update, 10, 0.2) for update in range(13)]
    expected = [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert warmup_linear(0, 10, 0.0) == 1.0


def test_the_schedule_is_the_rate_of_each_update() -> None:
    start, row = [1.0, -2.0], [0.5, 0.25]
    parameters = scalars(start)
    optimizer = BertAdam(parameters, 0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: warmup_linear(update, 10))
    for _ in range(10):
        give(parameters, list(row))
        optimizer.step()
        scheduler.step()
    lrs = [0.0, *(0.3 * (10 - update) / 9 for update in range(1, 10))]
    expected = oracle(start, [list(row)] * 10, lrs=lrs)
    np.testing.assert_allclose([p.item() for p in parameters], expected, rtol=1e-12)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(2, 300))
def test_the_house_schedule_is_never_zero_and_differs_by_one_updates_rise_at_most(updates: int) -> None:
    same = [schedule(OptimizerOptions(schedule="warmup-linear", warmup=0.1), u, updates) for u in range(updates)]
    assert same == [warmup_linear(u, updates, 0.1) for u in range(updates)]
    ours = [schedule(OptimizerOptions(schedule="linear", warmup=0.1), update, updates) for update in range(updates)]
    theirs = [warmup_linear(update, updates, 0.1) for update in range(updates)]
    assert theirs[0] == 0.0 < ours[0]
    assert 0 < ours[-1] <= theirs[-1] * (1 + 1e-12)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1 / (0.1 * updates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr to be a finite number of 0 or more, got -1.0"),
        ({"lr": math.nan}, "lr to be a finite number of 0 or more, got nan"),
        ({"lr": 1.0, "eps": 0.0}, "eps to be a finite number above 0, got 0.0"),
        ({"lr": 1.0, "weight_decay": math.inf}, "weight_decay to be a finite number of 0 or more, got inf"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, r"betas to be 2 numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BertAdam(scalars([1.0]), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("updates", "warmup"), [(0, 0.1), (10, 1.0), (10, -0.1)])
def test_a_schedule_of_nothing_is_refused(updates: int, warmup: float) -> None:
    with pytest.raises(ConfigurationError, match=r"updates of 1 or more and a warmup in \[0, 1\)"):
        warmup_linear(0, updates, warmup)


def test_a_sparse_gradient_is_refused() -> None:
    words = nn.Embedding(5, 2, sparse=True)
    words(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigurationError, match="dense gradients for BertAdam, got a sparse one"):
        BertAdam(words.parameters(), 0.1).step()
