"""The training loop: what an update is, and that a run killed at any moment ends as one never killed."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from support.spawn import environment
from torch import Tensor, nn

import advvl
import advvl.fit.checks
import advvl.fit.loop
from advvl import (
    L2,
    Adapter,
    AdversarialTraining,
    Ascent,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Site,
    SymmetricKL,
    Uniform,
    adapt,
)
from advvl.errors import CheckpointError, ConfigurationError, DataError, NonFiniteError, OutputDirectoryError
from advvl.files import read_torch, write_torch
from advvl.fit.checkpoints import Checkpoints
from advvl.fit.loop import FitResult, fit
from advvl.fit.options import LoopOptions, OptimizerOptions
from advvl.fit.schedules import examples_of, parameter_groups, schedule, updates_per_epoch
from advvl.fit.signals import deferred_signals
from advvl.runtime.randomness import derive_seed

pytestmark = pytest.mark.slow

OPTIONS = OptimizerOptions(epochs=3, batch_size=4, learning_rate=0.05, weight_decay=0.1, warmup=0.3, clip=1.0)
UPDATES = 3 * (18 // 4)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor | None = None


class Toy(nn.Module):
    """Dropout draws from the global generator, as real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Output:
        logits = self.last(self.dropout(self.norm(self.first(x))))
        return Output(loss=((logits - y) ** 2)[:, 0], logits=torch.cat([logits, -logits], 1))


@dataclass
class Source:
    """Rows with noise from the batch's generator; `at` is called before the batch of that call."""

    at: dict[int, Callable[[], None]] = field(default_factory=dict)
    poison: int | None = None
    asked: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return 18

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        call = len(self.asked)
        self.asked.append(list(indices))
        self.at.get(call, lambda: None)()
        rows = torch.arange(54.0).view(18, 3).sin()[list(indices)]
        y = rows.sum(1, keepdim=True) + 0.1 * torch.randn(len(indices), 1, generator=generator)
        if call == self.poison:
            y = y * math.nan
        return {"x": rows, "y": y, "task": "ab"[call % 2]}


def toy() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Toy()


LOOP = {item.name for item in fields(LoopOptions)}


def run(model: nn.Module, source: Source | None = None, **arguments: Any) -> FitResult:
    """`fit` with arguments and options of the loop side by side."""
    usual = {"options": OPTIONS, "seed": 3, "accelerator": Accelerator(cpu=True)}
    loop = LoopOptions(**{name: arguments.pop(name) for name in LOOP & set(arguments)})
    return fit(model, Source() if source is None else source, **{**usual, "loop": loop, **arguments})


def bits(model: nn.Module) -> bytes:
    return b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())


class Stop(Exception):
    """Stands for a kill at this moment."""


def stop() -> None:
    raise Stop


def sited(model: nn.Module) -> Adapter:
    return adapt(model, {"image": Site("first", at="input")})


ASCENT = Ascent(L2(0.5), step_size=0.3, start=Uniform(0.2))
METHODS = {
    "villa": AdversarialTraining(EmbeddingPerturber(image=ASCENT), FreeLB(2), SymmetricKL(weight=0.5)),
    "free-at": AdversarialTraining(EmbeddingPerturber(image=ASCENT), FreeAT(3)),
}


def test_training_lowers_the_loss() -> None:
    result = run(toy(), options=replace(OPTIONS, epochs=40))
    assert result.updates == len(result.losses) == 40 * 4
    assert sum(result.losses[-8:]) < 0.5 * sum(result.losses[:8])
    assert result.seconds > 0
    assert result.seconds_per_update == result.seconds / result.updates


def test_one_update_is_adamw_on_the_mean_loss_clipped() -> None:
    options = replace(OPTIONS, clip=0.05)
    model, expected = toy(), toy()
    for both in (model, expected):
        both.dropout.p = 0.0
    source = Source()
    run(model, source, options=options, updates=1)
    generator = torch.Generator().manual_seed(derive_seed(3, "batch", 0))
    batch = Source().batch(source.asked[0], generator)
    expected(**batch).loss.mean().backward()
    total = torch.cat([p.grad.flatten() for p in expected.parameters() if p.grad is not None]).norm()
    assert total > 0.05
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad * (0.05 / total)
        decay = 0.0 if name.endswith("bias") or name.startswith("norm") else options.weight_decay
        step = gradient / (gradient.abs() + 1e-8)  # the first step of Adam, bias corrected
        want = parameter * (1 - options.learning_rate * decay) - options.learning_rate * step
        torch.testing.assert_close(model.get_parameter(name), want, rtol=1e-4, atol=1e-6)


class Bare(Toy):
    """What transformers' models give, asked for anything but a `ModelOutput`; a tuple's loss is a number."""

    kind: type = dict

    def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Any:
        output = super().forward(x, y, task)
        return {"loss": output.loss} if self.kind is dict else (output.loss.mean(), output.logits)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_the_loss_is_read_off_outputs_of_any_kind(kind: type) -> None:
    named, bare = toy(), Bare()
    bare.load_state_dict(named.state_dict())
    bare.kind = kind
    assert run(bare).losses == run(named).losses


def test_outputs_without_a_loss_say_what_to_do() -> None:
    class Lossless(Toy):
        def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Any:
            return {"logits": self.first(x)}

    with pytest.raises(
        ConfigurationError, match=r"expected outputs with a loss, got dict of \['logits'\] without; give"
    ):
        run(Lossless())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    random.seed(1)
    first, second, third = toy(), toy(), toy()
    losses = run(first).losses
    random.seed(2)
    torch.manual_seed(5)
    assert run(second).losses == losses
    assert bits(first) == bits(second)
    assert run(third, seed=4).losses != losses


def test_the_global_generators_are_left_as_found() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(toy())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_every_epoch_is_a_permutation_of_its_own_in_whole_batches() -> None:
    source = Source()
    run(toy(), source)
    assert len(source.asked) == UPDATES
    epochs = [[i for batch in source.asked[start : start + 4] for i in batch] for start in (0, 4, 8)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 16
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert source.asked == [examples_of(update, 18, 4, 3) for update in range(UPDATES)]


@pytest.mark.parametrize(
    ("examples", "size", "count", "length"), [(3, 8, 1, 3), (8, 8, 1, 8), (17, 8, 2, 8), (1, 1, 1, 1)]
)
def test_a_source_smaller_than_a_batch_is_one_batch(examples: int, size: int, count: int, length: int) -> None:
    assert updates_per_epoch(examples, size) == count
    assert {len(examples_of(update, examples, size, 0)) for update in range(5)} == {length}


@pytest.mark.parametrize("updates", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["one-cycle", "linear"])
def test_the_learning_rate_rises_to_its_highest_and_falls(kind: Any, warmup: float, updates: int) -> None:
    options = replace(OPTIONS, schedule=kind, warmup=warmup)
    factors = [schedule(options, update, updates) for update in range(updates)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if updates == 100:
        assert max(factors) > 0.98
        assert abs(top - warmup * 99) <= 1
        assert factors[-1] < 0.02


def test_one_cycle_agrees_with_pytorchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=101, pct_start=31 / 101, cycle_momentum=False
    )
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycle.step()
    options = replace(OPTIONS, warmup=0.3)
    assert [schedule(options, update, 101) for update in range(101)] == pytest.approx(rates, abs=1e-9)


def test_biases_and_normalisations_are_spared_from_weight_decay_and_frozen_parameters_left_out() -> None:
    model = toy()
    model.last.weight.requires_grad_(False)
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model.first.weight)]
    assert {id(p) for p in spared["params"]} == {
        id(p) for p in (model.first.bias, model.last.bias, model.norm.weight, model.norm.bias)
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())], momentum=0.9
    )


def test_an_optimiser_of_ones_own_keeps_its_groups_rates_under_the_schedule(tmp_path: Path) -> None:
    model, expected = toy(), toy()
    for both in (model, expected):
        both.dropout.p = 0.0
    source = Source()
    options = replace(OPTIONS, clip=math.inf)
    run(model, source, options=options, updates=3, optimizer=sgd, checkpoint=tmp_path / "run.pt")
    theirs = sgd(expected)
    for update in range(3):
        generator = torch.Generator().manual_seed(derive_seed(3, "batch", update))
        expected(**Source().batch(source.asked[update], generator)).loss.mean().backward()
        for i, group in enumerate(theirs.param_groups):
            group["lr"] = 0.1 * (i + 1) * schedule(options, update, 3)
        theirs.step()
        theirs.zero_grad()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)
    again = toy()  # the rates of a checkpoint are those of its last update, not what the schedule multiplies
    run(again, options=options, updates=3, optimizer=sgd, checkpoint=tmp_path / "run.pt", resume=True)
    assert bits(again) == bits(model)


class Words(nn.Module):
    """A mean over labelled words: one number, of another number of words in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 1)
        self.double()

    def forward(self, x: Tensor, y: Tensor, task: str) -> Output:
        del task
        words = x.double().reshape(-1, 1)
        return Output((self.last(words[words[:, 0] > -0.5]) ** 2).mean() + 0 * y.sum())


def labelled(batch: Any) -> Tensor:
    return (batch["x"] > -0.5).sum()


@pytest.mark.parametrize("accumulate", [2, 3, 4])
@pytest.mark.parametrize("kind", ["rows", "words"])
def test_micro_batches_leave_what_the_whole_batch_leaves(kind: str, accumulate: int) -> None:
    """Also where the batch is not cut evenly (4 in 3), or words are not; a source without draws, so that all is alike."""

    class Still(Source):
        def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
            batch = super().batch(indices, generator)
            return {**batch, "x": batch["x"].double(), "y": batch["x"].double().sum(1, keepdim=True), "task": "a"}

    def trained(accumulate: int) -> tuple[nn.Module, FitResult]:
        model: nn.Module = toy().double() if kind == "rows" else Words()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        arguments: dict[str, Any] = {"optimizer": sgd, "accumulate": accumulate}
        return model, run(model, Still(), **arguments, count=None if kind == "rows" else labelled)

    if kind == "words":
        torch.manual_seed(0)
    whole, expected = trained(1)
    if kind == "words":
        torch.manual_seed(0)
    parts, result = trained(accumulate)
    assert result.losses == pytest.approx(expected.losses, rel=1e-12)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), parameter, rtol=1e-12, atol=1e-14)


def test_means_over_words_of_several_micro_batches_have_to_be_counted() -> None:
    with pytest.raises(ConfigurationError, match=r"one loss per row \(B,\), or count="):
        run(Words(), accumulate=2)
    with pytest.raises(DataError, match=r"count\(batch\) of 1 or more in each part of an update, got less in 2"):
        run(Words(), accumulate=2, count=lambda batch: 0)


def test_losses_that_are_neither_one_nor_one_a_row_are_refused_in_micro_batches() -> None:
    class Odd(Toy):
        def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Output:
            return Output(super().forward(x, y, task).loss.repeat(2)[1:])

    with pytest.raises(ConfigurationError, match="a scalar loss or one for each of 2 rows, got"):
        run(Odd(), accumulate=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"accumulate": 0}, "accumulate to be a whole number of 1 or more, got 0"),
        ({"accumulate": 5}, "1 processes times 5 micro-batches, got 4"),
        ({"nonfinite": "keep"}, "nonfinite to be one of raise, skip, got 'keep'"),
        ({"accumulate": 2, "method": "free-at"}, r"accumulate=1 with 3 updates a batch \(FreeAT\), got 2"),
    ],
    ids=["none", "too many", "policy", "free-at"],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], said: str) -> None:
    if "method" in arguments:
        arguments = {**arguments, "method": METHODS[arguments["method"]], "target": sited}
    with pytest.raises(ConfigurationError, match=said):
        run(toy(), **arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": True},
        {"accumulate": "2"},
        {"skip_limit": 0},
        {"checkpoint_seconds": -1.0},
        {"checkpoint_seconds": math.nan},
        {"progress": 1},
        {"description": ""},
        {"line": -1},
    ],
    ids=str,
)
def test_options_of_the_loop_out_of_range_or_of_another_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {next(iter(wrong))} to be .*, got "):
        LoopOptions(**wrong)


def test_an_accelerator_that_accumulates_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "gradient_accumulation_steps", 4)
    with pytest.raises(
        ConfigurationError, match=r"gradient_accumulation_steps=1, got 4; give LoopOptions\(accumulate=4\)"
    ):
        run(toy())


def test_processes_that_share_parameters_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigurationError, match="hold all parameters, as under DDP, got FSDP"):
        run(toy())


@pytest.mark.parametrize("how", ["group", "launcher"])
def test_an_accelerator_that_does_not_know_of_the_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As Accelerator() is on CPUs under torchrun: every process would train alone, and write over the others' files."""
    accelerator = Accelerator(cpu=True)
    if how == "group":
        monkeypatch.setattr(advvl.fit.checks, "process_count", lambda: 2)
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"knows of all 2 processes, got one of 1.* Accelerator\(cpu=True\)"):
        fit(toy(), Source(), options=OPTIONS, seed=3, accelerator=accelerator)


class Counting(Toy):
    """A buffer that sees every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Output:
        self.seen = self.seen + y.detach().sum()
        return super().forward(x, y, task)


@dataclass
class Poisoned(Source):
    """Batches of these numbers are not finite."""

    calls: tuple[int, ...] = ()

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        self.poison = len(self.asked) if len(self.asked) in self.calls else None
        return super().batch(indices, generator)


@pytest.mark.parametrize("method", [None, "villa"])
def test_a_skipped_update_leaves_no_trace_but_its_number(method: str | None, tmp_path: Path) -> None:
    """The first, and two in a row; then the run goes on as from a checkpoint that says those updates are done."""
    arguments: dict[str, Any] = {} if method is None else {"method": METHODS[method], "target": sited}
    model = Counting()
    before = bits(model)
    result = run(model, Poisoned(calls=(0,)), nonfinite="skip", updates=1, **arguments)
    assert bits(model) == before
    assert (result.updates, result.skipped) == (1, 1)
    assert math.isnan(result.losses[0])
    model = Counting()
    result = run(model, Poisoned(calls=(0, 4, 5)), nonfinite="skip", checkpoint=tmp_path / "run.pt", **arguments)
    assert (result.updates, result.skipped) == (UPDATES, 3)
    assert [update for update, loss in enumerate(result.losses) if math.isnan(loss)] == [0, 4, 5]
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    again = run(Counting(), checkpoint=tmp_path / "run.pt", resume=True, nonfinite="skip", **arguments)
    assert again.skipped == 3


def test_too_many_skipped_updates_in_a_row_are_an_error(tmp_path: Path) -> None:
    run(toy(), Poisoned(calls=(1, 2, 4, 5)), nonfinite="skip", skip_limit=3)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row had to be skipped: .* loss in update 6, got nan"):
        run(toy(), Poisoned(calls=(1, 2, 4, 5, 6)), nonfinite="skip", skip_limit=3)
    file = tmp_path / "run.pt"  # also where the run was stopped in between
    with pytest.raises(Stop):
        run(
            toy(),
            Poisoned(calls=(4, 5), at={6: stop}),
            nonfinite="skip",
            skip_limit=3,
            checkpoint=file,
            checkpoint_seconds=0.0,
        )
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        run(toy(), Poisoned(calls=(0,)), nonfinite="skip", skip_limit=3, checkpoint=file, resume=True)


def test_an_update_that_raises_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    with pytest.raises(NonFiniteError):
        run(toy(), Source(poison=5), checkpoint=file, checkpoint_seconds=0.0)
    assert read_torch(file)["done"] == 5
    whole, parts = toy(), toy()
    run(whole)
    run(parts, checkpoint=file, resume=True)
    assert bits(parts) == bits(whole)


@pytest.mark.parametrize("keeps", ["raise", "keep"])
def test_a_loss_that_is_not_finite_touches_no_parameter_whatever_the_method_keeps(keeps: Any) -> None:
    class Unbounded(Toy):
        def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Output:
            output = super().forward(x, y, task)
            return replace(output, loss=output.loss + math.inf)

    method = replace(METHODS["villa"], nonfinite=keeps)
    for accumulate in (1, 2):
        model = Unbounded()
        before = bits(model)
        with pytest.raises(NonFiniteError, match="finite loss in update 0"):
            run(model, method=method, target=sited, accumulate=accumulate)
        result = run(model, method=method, target=sited, accumulate=accumulate, nonfinite="skip", updates=2)
        assert result.skipped == 2
        assert bits(model) == before


@pytest.mark.parametrize("keeps", ["raise", "keep"])
def test_nor_does_one_in_a_micro_batch_that_is_not_the_last(keeps: Any) -> None:
    class First(Toy):
        seen = 0

        def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Output:
            output = super().forward(x, y, task)
            self.seen += 1
            return replace(output, loss=output.loss + (math.inf if self.seen == 1 + 1 else 0.0))  # after the clean pass

    model = First()
    before = bits(model)
    method = replace(METHODS["villa"], nonfinite=keeps)
    result = run(model, method=method, target=sited, accumulate=2, nonfinite="skip", updates=1)
    assert result.skipped == 1
    assert bits(model) == before


def test_every_sigterm_is_noted_and_the_second_interrupt_is_obeyed(request: pytest.FixtureRequest) -> None:
    """A scheduler signals all processes of a job, and the launcher among them passes it on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell's background jobs
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with deferred_signals() as caught:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)  # to this thread, so that the handler has run by the next line
        assert caught.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert caught.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is not None


def test_what_has_taken_effect_cannot_be_skipped() -> None:
    with pytest.raises(ConfigurationError, match="expected nonfinite='raise' with 3 updates a batch"):
        run(toy(), method=METHODS["free-at"], target=sited, nonfinite="skip")


def test_another_rate_of_the_optimiser_is_another_run(tmp_path: Path) -> None:
    def rated(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda model: torch.optim.SGD(model.parameters(), lr=rate)

    file = tmp_path / "run.pt"
    run(toy(), optimizer=rated(0.1), checkpoint=file)
    with pytest.raises(CheckpointError, match=r"differs in optimizer\.groups\.0\.lr \(0\.1 there, 0\.2 here\)"):
        run(toy(), optimizer=rated(0.2), checkpoint=file, resume=True)


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate keeps one precision for all accelerators of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", [None, "villa"])
def test_half_precision_learns_what_full_precision_learns_but_for_its_rounding(
    method: str | None, fresh_state: None
) -> None:
    del fresh_state
    arguments: dict[str, Any] = {} if method is None else {"method": METHODS[method], "target": sited}
    full, seen = run(toy(), **arguments), []

    class Watched(Toy):
        def forward(self, x: Tensor, y: Tensor, task: str = "a") -> Output:
            output = super().forward(x, y, task)
            seen.append(output.logits.dtype if output.logits is not None else None)
            return output

    model = Watched()
    model.load_state_dict(toy().state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)
    half = run(model, accelerator=Accelerator(cpu=True, mixed_precision="bf16"), **arguments)
    assert set(seen) == {torch.bfloat16}
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.1)


def scaled() -> Accelerator:
    """An accelerator in float16 with a loss scaler, as on a GPU; the scale's first values are too large for float16."""
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    return accelerator


@pytest.mark.parametrize("method", [None, "villa", "free-at"])
def test_overflows_under_a_loss_scaler_are_its_own_to_skip_and_its_scale_is_resumed(
    tmp_path: Path, method: str | None, fresh_state: None
) -> None:
    del fresh_state
    arguments: dict[str, Any] = {}
    if method is not None:
        arguments |= {"method": replace(METHODS[method], nonfinite="keep"), "target": sited}
    model, before = toy(), bits(toy())
    run(model, **arguments, updates=1, accelerator=scaled())
    assert bits(model) == before
    whole, parts = toy(), toy()
    accelerator = scaled()
    expected = run(whole, **arguments, accelerator=accelerator)
    assert bits(whole) != before
    assert accelerator.scaler.get_scale() < 2.0**24
    file = tmp_path / "run.pt"
    with pytest.raises(Stop):
        run(parts, Source(at={5: stop}), checkpoint=file, checkpoint_seconds=0.0, accelerator=scaled(), **arguments)
    parts = toy()
    result = run(parts, checkpoint=file, resume=True, accelerator=scaled(), **arguments)
    assert result.losses == expected.losses
    assert (bits(parts), result.skipped) == (bits(whole), 0)


def test_a_method_that_raises_is_refused_under_a_loss_scaler(fresh_state: None) -> None:
    del fresh_state
    with pytest.raises(ConfigurationError, match="nonfinite='keep'"):
        run(toy(), method=METHODS["villa"], target=sited, accelerator=scaled())


def largest(model: nn.Module) -> float:
    assert not model.training
    torch.rand(7)  # an evaluation may draw
    return float(max(p.detach().abs().max() for p in model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 3, 4, 7, UPDATES - 1])
def test_a_run_with_a_directory_of_checkpoints_resumes_to_the_same_bits_scores_and_files(
    tmp_path: Path, moment: int
) -> None:
    whole, parts, plain = toy(), toy(), toy()
    run(plain)

    def store(name: str) -> Checkpoints:
        return Checkpoints(directory=tmp_path / name, keep_last=2, keep_best=2, evaluate=largest, every=3)

    arguments: dict[str, Any] = {"checkpoint_seconds": 0.0}
    expected = run(whole, checkpoint=store("whole"), **arguments)
    assert bits(whole) == bits(plain), "evaluating changes nothing"
    assert list(expected.scores) == [3, 6, 9, 12]
    assert all(module.training for module in whole.modules())
    best = sorted(expected.scores, key=lambda update: -expected.scores[update])[:2]
    assert set(store("whole").files()) == {11, 12, *best}
    weights = read_torch(store("whole").best_file())["model"]
    assert float(max(weight.abs().max() for weight in weights.values())) == max(expected.scores.values())
    with pytest.raises(Stop):
        run(parts, Source(at={moment: stop}), checkpoint=store("parts"), **arguments)
    parts = toy()
    result = run(parts, checkpoint=store("parts"), resume=True, **arguments)
    assert (result.losses, result.scores) == (expected.losses, expected.scores)
    assert bits(parts) == bits(whole)
    assert set(store("parts").files()) == set(store("whole").files())


def test_a_directory_that_is_not_to_be_resumed_has_to_be_empty(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path)
    run(toy(), checkpoint=store)
    with pytest.raises(OutputDirectoryError, match="resume=True"):
        run(toy(), checkpoint=store)


def test_the_best_is_saved_when_it_is_found_and_not_only_when_time_is_up(tmp_path: Path) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0])
    store = Checkpoints(directory=tmp_path, keep_best=1, evaluate=lambda model: next(scores), every=3)
    run(toy(), checkpoint=store, checkpoint_seconds=math.inf)
    assert list(store.files()) == [6, 12]


def test_a_score_that_is_not_a_number_ends_the_run(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path, evaluate=lambda model: math.nan, every=3)
    with pytest.raises(NonFiniteError, match="finite score after 3 updates, got nan"):
        run(toy(), checkpoint=store)


@pytest.mark.parametrize("update", [0, 5])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_update(update: int) -> None:
    model = toy()
    run(model, updates=UPDATES) if update == 0 else None
    before = bits(model)
    with pytest.raises(NonFiniteError, match=rf"loss in update {update}, got nan of the examples \[\d"):
        run(model, Source(poison=update))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (bits(model) == before) == (update == 0)


def test_gradients_that_are_not_finite_stop_the_run_before_they_touch_a_parameter() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, y: Tensor, task: str) -> Output:
            return Output(loss=(self.weight * x.sum()).abs().sqrt() + 1)

    model = Root()
    with pytest.raises(NonFiniteError, match="norm of the gradients in update 0"):
        run(model)
    assert model.weight == 0


def test_an_empty_source_is_refused() -> None:
    class Empty(Source):
        def __len__(self) -> int:
            return 0

    with pytest.raises(ConfigurationError, match="at least 1 example"):
        run(toy(), Empty())


@pytest.mark.parametrize("every", [0.0, math.inf], ids=["saving-always", "saving-at-the-end"])
@pytest.mark.parametrize("moment", [0, 1, 7, UPDATES - 1])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path, moment: int, every: float) -> None:
    file = tmp_path / "run.pt"
    whole, parts = toy(), toy()
    expected = run(whole, checkpoint=tmp_path / "whole.pt")
    with pytest.raises(Stop):
        run(parts, Source(at={moment: stop}), checkpoint=file, checkpoint_seconds=every)
    assert file.exists() == (every == 0 and moment > 0)
    parts = toy()
    source = Source()
    result = run(parts, source, checkpoint=file, checkpoint_seconds=every, resume=True)
    assert len(source.asked) == UPDATES - (moment if every == 0 else 0)
    assert result.losses == expected.losses
    assert result.updates == expected.updates
    assert bits(parts) == bits(whole)
    ours, theirs = read_torch(file), read_torch(tmp_path / "whole.pt")
    assert (ours["run"], ours["done"]) == (theirs["run"], theirs["done"])
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    torch.testing.assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)


def test_a_finished_run_resumes_to_its_result_without_an_update(tmp_path: Path) -> None:
    model, again = toy(), toy()
    result = run(model, checkpoint=tmp_path / "run.pt")
    source = Source()
    assert run(again, source, checkpoint=tmp_path / "run.pt", resume=True) == result
    assert source.asked == []
    assert bits(again) == bits(model)


def test_without_resume_an_old_file_is_not_read(tmp_path: Path) -> None:
    run(toy(), checkpoint=tmp_path / "run.pt")
    source = Source()
    run(toy(), source, checkpoint=tmp_path / "run.pt")
    assert len(source.asked) == UPDATES


def test_the_state_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    run(toy(), checkpoint=tmp_path / "run.pt")
    others: dict[str, dict[str, Any]] = {
        r"seed \(3 there, 4 here\)": {"seed": 4},
        r"updates \(12 there, 5 here\)": {"updates": 5},
        r"options\.clip \(1\.0 there, 2\.0 here\)": {"options": replace(OPTIONS, clip=2.0)},
        r"method \(None there, AdversarialTraining": {"method": METHODS["villa"], "target": sited},
        r"optimizer\.class \('AdamW' there, 'SGD' here\)": {"optimizer": sgd},
    }
    for said, other in others.items():
        with pytest.raises(CheckpointError, match=rf"run\.pt', got one that differs in {said}"):
            run(toy(), checkpoint=tmp_path / "run.pt", resume=True, **other)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run(toy(), checkpoint=tmp_path / "run.pt")
    write_torch(tmp_path / "run.pt", {**read_torch(tmp_path / "run.pt"), "format": 3})
    with pytest.raises(CheckpointError, match=r"format 2 in .*run\.pt', got format 3, written by a newer advvl"):
        run(toy(), checkpoint=tmp_path / "run.pt", resume=True)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run(toy(), checkpoint=tmp_path / "run.pt")
    wider = toy()
    wider.last = nn.Linear(5, 2)
    with pytest.raises(CheckpointError, match="last"):
        run(wider, checkpoint=tmp_path / "run.pt", resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_update_saves_and_exits(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # as a process in the foreground has it; one in the background of a shell is born ignoring SIGINT
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, handler)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    whole, parts = toy(), toy()
    expected = run(whole)
    file = tmp_path / "run.pt"
    with pytest.raises(SystemExit) as caught:
        run(parts, Source(at={5: lambda: os.kill(os.getpid(), number)}), checkpoint=file, checkpoint_seconds=math.inf)
    assert caught.value.code == 128 + number
    assert "stopped after update 6 of 12" in capsys.readouterr().err
    assert signal.getsignal(number) is handler
    assert read_torch(file)["done"] == 6
    parts = toy()
    assert run(parts, checkpoint=file, resume=True).losses == expected.losses
    assert bits(parts) == bits(whole)


def test_an_adversarial_update_leaves_what_the_methods_own_step_leaves() -> None:
    model, expected = toy(), toy()
    for both in (model, expected):
        both.dropout.p = 0.0
    source = Source()
    run(model, source, updates=1, method=METHODS["villa"], target=sited)
    batch = Source().batch(source.asked[0], torch.Generator().manual_seed(derive_seed(3, "batch", 0)))
    optimizer = torch.optim.AdamW(parameter_groups(expected, OPTIONS.weight_decay), lr=1.0, betas=OPTIONS.betas)
    generator = torch.Generator().manual_seed(derive_seed(3, "method", 0, 0))
    METHODS["villa"].step(sited(expected), batch, generator=generator)
    nn.utils.clip_grad_norm_(expected.parameters(), OPTIONS.clip)
    for group in optimizer.param_groups:
        group["lr"] = OPTIONS.learning_rate
    optimizer.step()
    assert bits(model) == bits(expected)


def test_only_batches_of_adversarial_tasks_get_the_adversarial_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    step = AdversarialTraining.step

    def watch(self: AdversarialTraining, model: Any, batch: Any, **arguments: Any) -> Any:
        seen.append(batch["task"])
        return step(self, model, batch, **arguments)

    monkeypatch.setattr(AdversarialTraining, "step", watch)
    run(toy(), method=METHODS["villa"], target=sited, adversarial_tasks={"b"})
    assert seen == ["b"] * (UPDATES // 2)


@pytest.mark.parametrize("by_task", [{"method": {"b": METHODS["villa"]}}, {"adversarial_tasks": {"b"}}])
def test_batches_without_a_task_are_refused_where_methods_go_by_tasks(by_task: dict[str, Any]) -> None:
    class Nameless(Source):
        def batch(self, indices: Any, generator: torch.Generator) -> dict[str, Any]:
            return {name: field for name, field in super().batch(indices, generator).items() if name != "task"}

    with pytest.raises(ConfigurationError, match=r"batches with an entry 'task'.*let the source add it"):
        run(toy(), Nameless(), **{"method": METHODS["villa"], "target": sited} | by_task)


def test_a_run_turns_adversarial_at_the_update_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it the weights are those of plain training, to the bit; a checkpoint is of no other schedule."""
    plain, mixed = toy(), toy()
    run(plain, updates=5)
    calls: list[int] = []
    step = AdversarialTraining.step

    def watch(self: AdversarialTraining, model: Any, batch: Any, **arguments: Any) -> Any:
        calls.append(1)
        return step(self, model, batch, **arguments)

    monkeypatch.setattr(AdversarialTraining, "step", watch)
    file = tmp_path / "run.pt"
    arguments: dict[str, Any] = {"updates": 5, "method": METHODS["villa"], "target": sited, "checkpoint": file}
    run(mixed, adversarial_from=5, **arguments)
    assert not calls
    assert bits(mixed) == bits(plain)
    run(toy(), adversarial_from=3, **arguments)
    assert len(calls) == 2
    with pytest.raises(CheckpointError, match="adversarial_from"):
        run(toy(), adversarial_from=2, resume=True, **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_an_adversarial_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path, method: str) -> None:
    """What free adversarial training carries from batch to batch is carried over the stop."""
    whole, parts = toy(), toy()
    arguments: dict[str, Any] = {"method": METHODS[method], "target": sited, "checkpoint_seconds": 0.0}
    expected = run(whole, **arguments)
    file = tmp_path / "run.pt"
    with pytest.raises(Stop):
        run(parts, Source(at={5: stop}), checkpoint=file, **arguments)
    parts = toy()
    assert run(parts, checkpoint=file, resume=True, **arguments).losses == expected.losses
    assert bits(parts) == bits(whole)
    assert (read_torch(file)["methods"][0]["deltas"] != {}) == (method == "free-at")


def test_a_replayed_update_is_applied_once_a_replay_and_no_more() -> None:
    class Counting(torch.optim.AdamW):
        steps = 0

        def step(self, *arguments: Any, **options: Any) -> Any:
            Counting.steps += 1
            return super().step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", Counting)
        run(toy(), method=METHODS["free-at"], target=sited, updates=4)
    assert Counting.steps == 4 * 3


def test_an_adversarial_loss_that_is_not_finite_names_the_update() -> None:
    with pytest.raises(NonFiniteError, match=r"loss in update 5, got nan .* rows \[0, 1, 2, 3\]"):
        run(toy(), Source(poison=5), method=METHODS["villa"], target=sited)


MOMENTS = {"update": 6, "before": 5, "after": 6}  # and how many updates are saved by then
DELAYS = [0.01 * k for k in range(8)]  # seconds; a whole run takes some 0.1


def stores(folder: Path, name: str) -> dict[str, Path | Checkpoints]:
    directory = Checkpoints(directory=folder / f"{name} many", keep_last=2, keep_best=1, evaluate=largest, every=2)
    return {"file": folder / f"{name}.pt", "directory": directory}


def run_to_be_killed(folder: Path, moment: str, store: str) -> None:
    """In the middle of an update, before a checkpoint is renamed into place, or after."""
    replace_file, calls = os.replace, []

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing(*names: Any) -> None:
        calls.append(names)
        if len(calls) == 6 and moment == "before":
            kill()
        replace_file(*names)
        if len(calls) == 6 and moment == "after":
            kill()

    os.replace = killing
    source = Source(at={6: kill} if moment == "update" else {})
    run(toy(), source, checkpoint=stores(folder, moment)[store], checkpoint_seconds=0.0)


def kill_runs(folder: Path) -> None:
    """Fork a run for each moment, and one for each delay, after which it is killed wherever it is."""
    torch.set_num_threads(1)
    for moment in [*MOMENTS, *map(str, DELAYS)]:
        for store in ("file", "directory"):
            child = os.fork()
            if not child:
                run_to_be_killed(folder, moment, store)
                os._exit(0)
            if moment not in MOMENTS:
                time.sleep(float(moment))
                os.kill(child, signal.SIGKILL)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert ended == -signal.SIGKILL or (moment not in MOMENTS and ended == 0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    command = "import sys, fit.test_loop as t; t.kill_runs(t.Path(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-c", command, str(folder)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("store", ["file", "directory"])
@pytest.mark.parametrize("moment", [*MOMENTS, *map(str, DELAYS)])
def test_a_process_killed_outright_resumes_to_the_same_bits(killed: Path, moment: str, store: str) -> None:
    whole, parts = toy(), toy()
    expected = run(whole)
    checkpoint = stores(killed, moment)[store]
    if moment in MOMENTS:
        latest = checkpoint if isinstance(checkpoint, Path) else checkpoint.latest()
        assert latest is not None
        assert read_torch(latest)["done"] == MOMENTS[moment]
    source = Source()
    assert run(parts, source, checkpoint=checkpoint, resume=True).losses == expected.losses
    if moment in MOMENTS:
        assert len(source.asked) == UPDATES - MOMENTS[moment]
    assert bits(parts) == bits(whole)


def test_time_is_that_of_the_updates_summed_over_resumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks at each look: writing checkpoints takes none of it."""
    clock = iter(range(10**6))
    monkeypatch.setattr(advvl.fit.loop.time, "perf_counter", lambda: float(next(clock)))
    file = tmp_path / "run.pt"
    with pytest.raises(Stop):
        run(toy(), Source(at={5: stop}), checkpoint=file, checkpoint_seconds=0.0)
    result = run(toy(), checkpoint=file, resume=True)
    assert result.seconds == UPDATES
    assert result.seconds_per_update == 1.0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a part of an update": ({"updates": 2.5}, "expected updates to be a whole number of 1 or more, got 2.5"),
    "fewer than no updates": ({"updates": -5}, "expected updates to be a whole number of 1 or more, got -5"),
    "no seed": ({"seed": None}, "expected seed to be a whole number below .*, got None"),
    "a seed in letters": ({"seed": "x"}, "expected seed to be a whole number below .*, got 'x'"),
    "a checkpoint as text": (
        {"checkpoint": "run.pt"},
        "expected checkpoint to be of type Path or Checkpoints or OneFile or None",
    ),
    "a recipe that was not called": (
        {"method": advvl.villa},
        "expected method to be of type AdversarialTraining or None",
    ),
    "no options": ({"options": None}, "expected options to be of type OptimizerOptions, got None"),
    "tasks as text": ({"adversarial_tasks": "mlm"}, "expected adversarial_tasks to be a collection of names, or None"),
    "a start before the first": (
        {"adversarial_from": -1},
        "expected adversarial_from to be a whole number of 0 or more",
    ),
    "a count": ({"count": 3}, "expected count as a function, or None"),
    "an optimiser that was made": ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer as a function"),
    "a device": ({"accelerator": "cpu"}, "expected accelerator to be of type Accelerator or None, got 'cpu'"),
    "resume in letters": ({"resume": "no"}, "expected resume to be True or False, got 'no'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_of_another_type_is_refused_before_the_first_batch(case: str) -> None:
    wrong, said = WRONG[case]
    source = Source()
    with pytest.raises(ConfigurationError, match=said):
        run(toy(), source, **wrong)
    assert not source.asked


def test_anything_but_a_model_and_a_source_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected model to be of type Module"):
        run(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"expected source to be a BatchSource, with len\(\) and batch"):
        fit(toy(), [1, 2], options=OPTIONS, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="got none that requires a gradient; unfreeze some"):
        run(toy().requires_grad_(False))


@pytest.mark.parametrize("place", ["folder", "file/run.pt"])
def test_a_checkpoint_that_cannot_be_written_is_found_before_the_first_update(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    source = Source()
    with pytest.raises(OutputDirectoryError):
        run(toy(), source, checkpoint=tmp_path / place)
    assert not source.asked


def test_a_run_keeps_a_second_one_from_its_checkpoints(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(OutputDirectoryError, match="no other process"):
            run(toy(), checkpoint=tmp_path / "run.pt", resume=True)

    run(toy(), Source(at={3: second}), checkpoint=tmp_path / "run.pt", checkpoint_seconds=0.0)
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_resumed_run_that_has_nothing_left_to_do_removes_what_a_kill_left(tmp_path: Path) -> None:
    store = Checkpoints(directory=tmp_path)
    run(toy(), checkpoint=store)
    (latest,) = store.files().values()
    stale = tmp_path / "update-00000003.pt"
    stale.write_bytes(latest.read_bytes())
    run(toy(), checkpoint=store, resume=True)
    assert list(store.files().values()) == [latest]
