"""The training loop over processes: what one process does, bit for bit where it can be, and never apart or for ever.

All groups of processes are forked by one launcher, which has imported everything once, and write what they found to a
folder that the tests read.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from support.spawn import environment
from torch import Tensor, nn

import advvl.fit.loop
from advvl import L2, AdversarialTraining, Ascent, EmbeddingPerturber, FreeAT, FreeLB, Site, SymmetricKL, Uniform, adapt
from advvl.data.digits.corpus import DigitsConfig, digits_corpus
from advvl.data.mixing import MixedSampler
from advvl.data.row_draws import RowDraws
from advvl.data.sampling import TokenBuckets
from advvl.errors import CheckpointError, ConfigurationError, DataError, NonFiniteError
from advvl.files import read_torch, write_torch
from advvl.fit.checkpoints import Checkpoints
from advvl.fit.loop import FitResult, fit
from advvl.fit.options import LoopOptions, OptimizerOptions
from advvl.fit.schedules import examples_of
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.pretraining import UniterForPretraining, loss_entries

pytestmark = pytest.mark.slow  # several processes

OPTIONS = OptimizerOptions(epochs=2, batch_size=6, learning_rate=0.05, clip=1.0)
EXAMPLES, UPDATES = 26, 8
SECONDS = 60  # until a process that waits for another gives up; nothing here comes near


@dataclass
class Output:
    loss: Tensor
    logits: Tensor | None = None


class Toy(nn.Module):
    """One loss a row or, as over words, one number for all that are labelled; parameters enough to be summed in pieces."""

    def __init__(self, *, words: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = words
        self.first, self.dropout, self.last = nn.Linear(3, 61), nn.Dropout(dropout), nn.Linear(61, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.double()

    def forward(self, x: Tensor, y: Tensor, labelled: Tensor) -> Output:
        if self.training:
            self.seen += y.detach().sum()
        logits = self.last(self.dropout(torch.tanh(self.first(x))))[..., 0]
        losses = (logits - y) ** 2
        if self.words:
            return Output(losses[labelled].mean(), torch.stack([logits[labelled], -logits[labelled]], -1))
        return Output(losses.mean(1), logits)


@dataclass
class Source:
    """Rows of four words, one to four of them labelled, with noise of each row's own; `at` is called before a batch."""

    at: dict[int, Callable[[], None]] = field(default_factory=dict)
    poison: int | None = None
    length: int = EXAMPLES
    asked: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        self.at.get(len(self.asked), lambda: None)()
        self.asked.append(list(indices))
        rows = torch.tensor(list(indices))
        x = torch.arange(EXAMPLES * 12, dtype=torch.float64).view(-1, 4, 3).sin()[rows]
        y = x.sum(2) + 0.1 * RowDraws.of(rows, generator).uniform("noise", 4)
        y[rows == (-1 if self.poison is None else self.poison)] = torch.nan
        return {"x": x, "y": y, "labelled": torch.arange(4) <= (rows % 4)[:, None]}


def labelled(batch: dict[str, Any]) -> Tensor:
    return batch["labelled"].sum()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def sited(model: nn.Module) -> Any:
    return adapt(model, {"image": Site("first", at="input")})


def sited_in_words(model: nn.Module) -> Any:
    """Logits are those of the labelled words."""
    positions = lambda batch: batch["labelled"][batch["labelled"]]  # noqa: E731
    return adapt(model, {"image": Site("first", at="input")}, positions=positions)


def method(maximizer: Any, **start: Any) -> dict[str, Any]:
    perturber = EmbeddingPerturber(image=Ascent(L2(0.5), step_size=0.3, **start))
    penalty = None if isinstance(maximizer, FreeAT) else SymmetricKL(0.5)
    return {"method": AdversarialTraining(perturber, maximizer, penalty), "target": sited}


def toy(**options: Any) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Toy(**options)


CASES: dict[str, dict[str, Any]] = {
    "rows": {},
    "adamw": {"optimizer": None},
    "uneven": {"options": replace(OPTIONS, batch_size=5)},
    "words": {"words": True, "count": labelled},
    "villa": method(FreeLB(2)),
    "villa-words": {"words": True, "count": labelled, **method(FreeLB(2)), "target": sited_in_words},
    "villa-uneven": {"options": replace(OPTIONS, batch_size=5), **method(FreeLB(3))},
}
BUCKETS = [
    TokenBuckets(1 + torch.arange(n) % 7, 14, micro_batches=4, bucket=8, multiple=1) for n in (16, EXAMPLES - 16)
]
SAMPLED = {"sampler": MixedSampler(dict(zip("ab", BUCKETS, strict=True)), {"a": 2, "b": 1}), "updates": UPDATES}
RANDOM = {"dropout": {"dropout": 0.3}, "starts": {"dropout": 0.3, **method(FreeLB(2), start=Uniform(0.2))}}
CARRIED = {"dropout": 0.3, **method(FreeAT(2))}


def train(
    *, words: bool = False, dropout: float = 0.0, source: Source | None = None, **arguments: Any
) -> tuple[Toy, FitResult, Source]:
    model, source = toy(words=words, dropout=dropout), source or Source()
    usual = {"options": OPTIONS, "seed": 3, "optimizer": sgd, "accelerator": Accelerator(cpu=True)}
    loop = LoopOptions(
        **{item.name: arguments.pop(item.name) for item in fields(LoopOptions) if item.name in arguments}
    )
    return model, fit(model, source, **{**usual, "loop": loop, **arguments}), source


def found(model: nn.Module, result: FitResult, source: Source) -> dict[str, Any]:
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "losses": list(result.losses),
        "skipped": result.skipped,
        "scores": dict(result.scores),
        "asked": source.asked,
    }


def case(**arguments: Any) -> dict[str, Any]:
    return found(*train(**arguments))


def error(kind: type[BaseException], **arguments: Any) -> str:
    """What a run that fails says."""
    with pytest.raises(kind) as raised:
        train(**arguments)
    return str(raised.value)


def stopped(**arguments: Any) -> int:
    with pytest.raises(SystemExit) as raised:
        train(**arguments)
    return int(raised.value.code or 0)


def captions() -> dict[str, Any]:
    """Pre-training on captions: tasks drawn alike in every process, masked words and regions of different numbers."""
    corpus = digits_corpus(
        DigitsConfig(
            train_questions=10, validation_questions=10, test_questions=10, captions=40, validation_captions=10
        )
    )
    config = UniterConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=corpus.max_text_length,
        img_dim=corpus.feature_dim,
        img_label_dim=corpus.label_dim,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tasks: list[str] = []

    class Doubled:
        def __len__(self) -> int:
            return len(corpus.pretrain)

        def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
            batch = corpus.pretrain.batch(indices, generator)
            tasks.append(batch["task"])
            floating = {k: v.double() for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
            return {**batch, **floating}

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = UniterForPretraining(config).double()
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    result = fit(
        model,
        Doubled(),
        options=replace(OPTIONS, batch_size=9),
        seed=4,
        updates=6,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        accelerator=Accelerator(cpu=True, kwargs_handlers=handlers),
        count=loss_entries,
    )
    assert result.updates == 6
    return {"parameters": dict(model.named_parameters()), "losses": list(result.losses), "tasks": tasks}


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def pair(rank: int, folder: Path) -> dict[str, Any]:
    """What two processes do that both live."""
    r: dict[str, Any] = {name: case(**arguments) for name, arguments in CASES.items()}
    r["captions"] = captions()
    for name, arguments in RANDOM.items():
        r[f"{name} in micro-batches"] = case(**arguments, accumulate=2, options=replace(OPTIONS, batch_size=6))
        r[f"{name} whole"] = case(**arguments)
    mine = {5: kill(signal.SIGTERM)} if rank == 1 else {}
    for name, arguments in {**RANDOM, "carried": CARRIED}.items():
        file = folder / f"{name}.pt"
        r[f"{name} exit"] = stopped(**arguments, checkpoint=file, source=Source(at=mine))
        r[f"{name} saved"] = read_torch(file)["done"]
        r[f"{name} resumed"] = case(**arguments, checkpoint=file, resume=True)
        r[f"{name} uninterrupted"] = case(**arguments)
    interrupt = {5: kill(signal.SIGINT)} if rank == 0 else {}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    r["interrupt exit"] = stopped(source=Source(at=interrupt))

    stopped(checkpoint=folder / "two.pt", source=Source(at=mine))  # for one process to take up
    r["sampled"] = case(**SAMPLED, accumulate=2)
    late = {9: kill(signal.SIGTERM)} if rank == 1 else {}
    stopped(**SAMPLED, accumulate=2, checkpoint=folder / "sampled.pt", source=Source(at=late))
    r["unsampled"] = error(ConfigurationError, **SAMPLED, accumulate=3)
    r["from one"] = case(checkpoint=folder / "one.pt", resume=True)

    other = {True: {}, False: {"seed": 4}}[rank == 0]
    r["seeds"] = error(ConfigurationError, **other)
    r["options"] = error(ConfigurationError, options=replace(OPTIONS, clip=1.0 + rank))
    r["examples"] = error(ConfigurationError, source=Source(length=EXAMPLES - rank))
    r["methods"] = error(ConfigurationError, **method(FreeLB(2 + rank)))
    r["tasks"] = error(ConfigurationError, **CASES["villa"], adversarial_tasks={"ab"[rank]})
    r["resume"] = error(ConfigurationError, checkpoint=folder / "one.pt", resume=rank == 0)
    r["files"] = error(ConfigurationError, checkpoint=folder / f"only{rank}.pt", resume=True)
    r["newer"] = error(CheckpointError, checkpoint=folder / "newer.pt", resume=True)
    r["truncated"] = error(CheckpointError, checkpoint=folder / "truncated.pt", resume=True)
    r["empty"] = error(DataError, words=True, count=lambda batch: labelled(batch) * rank)
    r["uncounted"] = error(ConfigurationError, words=True)
    r["too small"] = error(ConfigurationError, options=replace(OPTIONS, batch_size=6), accumulate=4)

    for name, arguments in POLICIES.items():
        file = folder / f"raise {name}.pt"
        r[f"{name} raises"] = error(NonFiniteError, **arguments, source=Source(poison=POISONED), checkpoint=file)
        if name in SKIPPABLE:
            r[f"{name} skips"] = case(**arguments, source=Source(poison=POISONED), nonfinite="skip")

    writes: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(advvl.fit.checkpoints, "write_torch", lambda p, s: writes.append(p.name) or write_torch(p, s))
        clock = iter(range(10**6))
        steps = 1.0 if rank == 0 else 1e6  # the other's clock runs away
        patched.setattr(advvl.fit.loop.time, "monotonic", lambda: steps * next(clock))
        store = Checkpoints(
            directory=folder / "many", keep_last=9, keep_best=1, evaluate=lambda m: [3.0, 9.0][rank] + seen(m), every=3
        )
        r["judged"] = case(checkpoint=store, checkpoint_seconds=2.0)
    r["writes"] = writes
    return r


def seen(model: nn.Module) -> float:
    assert not model.training
    return 0.0


POISONED = 11
POLICIES = {
    "plain": {},
    "micro-batches": {"accumulate": 2},
    "villa": method(FreeLB(2)),
    "villa in micro-batches": {"accumulate": 2, **method(FreeLB(2))},
    "carried": method(FreeAT(2)),
}
SKIPPABLE = [name for name in POLICIES if name != "carried"]  # FreeAT's first update of a batch has taken effect


def trio(rank: int, folder: Path) -> dict[str, Any]:
    """Three sum in an order that depends on how gradients lie in memory."""
    del rank
    r = {}
    for name, arguments in {**RANDOM, "carried": CARRIED}.items():
        file = folder / f"trio {name}.pt"
        r[f"{name} exit"] = stopped(**arguments, checkpoint=file, source=Source(at={4: kill(signal.SIGTERM)}))
        r[f"{name} resumed"] = case(**arguments, checkpoint=file, resume=True)
        r[f"{name} uninterrupted"] = case(**arguments)
    return r


def four(rank: int, folder: Path) -> dict[str, Any]:
    del rank, folder
    return {name: case(**arguments) for name, arguments in {**CASES, **RANDOM, "sampled": SAMPLED}.items()}


def dying_in_an_update(rank: int, folder: Path) -> dict[str, Any]:
    """Process 1 is gone in the middle of the sixth update."""
    at = {5: kill(signal.SIGKILL)} if rank == 1 else {}
    train(**RANDOM["dropout"], source=Source(at=at), checkpoint=folder / "update.pt", checkpoint_seconds=0.0)
    return {}


def dying_in_a_write(rank: int, folder: Path) -> dict[str, Any]:
    """Process 0 is gone before its fourth checkpoint is renamed into place."""
    calls: list[Any] = []
    rename = os.replace

    def killing(*names: Any) -> None:
        calls.append(names)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    if rank == 0:
        os.replace = killing
    train(**RANDOM["dropout"], checkpoint=Checkpoints(directory=folder / "write"), checkpoint_seconds=0.0)
    return {}


def taking_up(rank: int, folder: Path) -> dict[str, Any]:
    del rank
    return {
        "update": case(**RANDOM["dropout"], checkpoint=folder / "update.pt", resume=True),
        "write": case(**RANDOM["dropout"], checkpoint=Checkpoints(directory=folder / "write"), resume=True),
    }


GROUPS: dict[str, tuple[Callable[[int, Path], dict[str, Any]], int]] = {
    "pair": (pair, 2),
    "trio": (trio, 3),
    "four": (four, 4),
    "dying in an update": (dying_in_an_update, 2),
    "dying in a write": (dying_in_a_write, 2),
    "taking up": (taking_up, 2),
}


def launch(folder: Path) -> None:
    """Fork one group after the other, and note how each process ended; one that does not end is killed and noted."""
    torch.set_num_threads(1)
    ends: dict[str, list[int | None]] = {}
    for name, (_, size) in GROUPS.items():
        children = [_fork(name, rank, folder) for rank in range(size)]
        deadline = time.monotonic() + 2 * SECONDS
        ends[name] = [_wait(child, deadline) for child in children]
    (folder / "ends.json").write_text(json.dumps(ends))


def _fork(name: str, rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work, size = GROUPS[name]
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({key: str(value) for key, value in numbers.items()})
        timeout = datetime.timedelta(seconds=SECONDS)
        store = dist.FileStore(str(folder / f"store {name}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        torch.save(work(rank, folder), folder / f"{name} {rank}.pt")
        status = 0
    except BaseException:
        (folder / f"{name} {rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with pytest.raises(SystemExit):
        train(checkpoint=folder / "one.pt", source=Source(at={5: kill(signal.SIGTERM)}))
    state = read_torch(folder / "one.pt")
    write_torch(folder / "newer.pt", {**state, "format": 99})
    (folder / "truncated.pt").write_bytes((folder / "one.pt").read_bytes()[:-100])
    write_torch(folder / "only0.pt", state)
    command = "import sys, fit.test_loop_processes as t; t.launch(t.Path(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-c", command, str(folder)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return folder


def of(folder: Path, group: str) -> list[dict[str, Any]]:
    """What each process of a group found."""
    ends = json.loads((folder / "ends.json").read_text())[group]
    said = "\n".join(path.read_text() for path in folder.glob(f"{group} *.txt"))
    assert ends == [0] * len(ends), said
    return [torch.load(folder / f"{group} {rank}.pt", weights_only=False) for rank in range(len(ends))]


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same bits."""
    assert one["losses"] == other["losses"]
    torch.testing.assert_close(one["parameters"], other["parameters"], rtol=0, atol=0)


def assert_close(one: dict[str, Any], other: dict[str, Any], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(one["losses"], other["losses"], rtol=rtol, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(one["parameters"], other["parameters"], rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("group", ["pair", "four"])
@pytest.mark.parametrize("name", CASES)
def test_processes_learn_what_one_learns_from_the_whole_batch(folder: Path, group: str, name: str) -> None:
    """Gradients, momentum and clipping of eight updates, in float64; also where rows or words are not shared out evenly."""
    expected = case(**CASES[name])
    tolerance = 1e-9 if name == "adamw" else 1e-12  # Adam divides by the root of small second moments
    for result in of(folder, group):
        assert_close(result[name], expected, tolerance)


@pytest.mark.parametrize("group", ["pair", "four"])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_parameters_are_the_same_bits_in_all_processes(folder: Path, group: str, name: str) -> None:
    first, *others = of(folder, group)
    for other in others:
        assert_equal(first[name], other[name])


@pytest.mark.parametrize("group", ["pair", "four"])
def test_each_update_has_the_examples_that_its_seed_and_number_say(folder: Path, group: str) -> None:
    shares = [result["uneven"]["asked"] for result in of(folder, group)]
    for update in range(len(shares[0])):
        whole = examples_of(update, EXAMPLES, 5, 3)
        assert [share[update] for share in shares] == [whole[rank :: len(shares)] for rank in range(len(shares))]


def parts_of(asked: list[list[list[int]]], accumulate: int) -> list[list[list[int]]]:
    """The examples of each part of each update, from those that each process asked for."""
    updates = range(len(asked[0]) // accumulate)
    return [
        [asked[part % len(asked)][update * accumulate + part // len(asked)] for part in range(len(asked) * accumulate)]
        for update in updates
    ]


@pytest.mark.parametrize(("group", "accumulate"), [("pair", 2), ("four", 1)])
def test_a_samplers_parts_are_the_same_on_any_number_of_processes(folder: Path, group: str, accumulate: int) -> None:
    expected = case(**SAMPLED, accumulate=4)
    results = [result["sampled"] for result in of(folder, group)]
    parts = parts_of([result["asked"] for result in results], accumulate)
    assert parts == parts_of([expected["asked"]], 4)
    assert parts == [SAMPLED["sampler"].parts(update, 3) for update in range(UPDATES)]
    for result in results:
        assert_close(result, expected)


def test_a_sampled_run_that_two_processes_began_is_ended_by_one(folder: Path) -> None:
    """In the middle of an epoch, on micro-batches in the place of processes."""
    expected = case(**SAMPLED, accumulate=4)
    done = read_torch(folder / "sampled.pt")["done"]
    assert 0 < done < UPDATES
    resumed = case(**SAMPLED, accumulate=4, checkpoint=folder / "sampled.pt", resume=True)
    assert resumed["asked"] == expected["asked"][done * 4 :]
    assert_close(resumed, expected)


def test_a_sampler_of_another_number_of_parts_is_refused(folder: Path) -> None:
    for result in of(folder, "pair"):
        assert re.search("expected a sampler of 6 parts, .* got one of 4", result["unsampled"])


def test_pretraining_draws_one_task_for_all_and_weighs_what_it_masks(folder: Path) -> None:
    expected = captions()
    assert len(set(expected["tasks"])) == 3
    for result in of(folder, "pair"):
        assert result["captions"]["tasks"] == expected["tasks"]
        assert_close(result["captions"], expected)


@pytest.mark.parametrize("name", RANDOM)
def test_as_many_parts_draw_alike_whoever_computes_them(folder: Path, name: str) -> None:
    """Dropout and starts of four processes, of two with two micro-batches each, and of one with four."""
    expected = case(**RANDOM[name], accumulate=4)
    assert_close(of(folder, "pair")[0][f"{name} in micro-batches"], expected)
    assert_close(of(folder, "four")[0][name], expected)
    with pytest.raises(AssertionError):
        assert_close(of(folder, "pair")[0][f"{name} whole"], expected)


@pytest.mark.parametrize("group", ["pair", "trio"])
@pytest.mark.parametrize("name", [*RANDOM, "carried"])
def test_a_signal_to_one_process_ends_all_and_they_resume_to_the_same_bits(folder: Path, group: str, name: str) -> None:
    """Two and three: from three on, the order in which gradients are summed is another question."""
    for result in of(folder, group):
        assert result[f"{name} exit"] == 128 + signal.SIGTERM
        assert len(result[f"{name} resumed"]["asked"]) < UPDATES + 1
        assert_equal(result[f"{name} resumed"], result[f"{name} uninterrupted"])
        if group == "pair":
            assert result[f"{name} saved"] == 6


def test_an_interrupt_ends_all_with_its_own_status(folder: Path) -> None:
    assert {result["interrupt exit"] for result in of(folder, "pair")} == {128 + signal.SIGINT}


def test_two_processes_go_on_from_the_checkpoint_of_one_and_one_from_that_of_two(folder: Path) -> None:
    expected = case()
    for rank, result in enumerate(of(folder, "pair")):
        assert_close(result["from one"], expected, rtol=1e-9)
        assert result["from one"]["asked"] == [share[rank::2] for share in expected["asked"][6:]]
    ours = case(checkpoint=folder / "two.pt", resume=True)
    assert_close(ours, expected, rtol=1e-9)
    assert ours["asked"] == expected["asked"][6:]


def test_perturbations_carried_by_other_processes_are_reset_with_a_warning(folder: Path) -> None:
    of(folder, "pair")
    with pytest.warns(UserWarning, match="carried by 2 processes cannot be handed on to 1"):
        resumed = case(**CARRIED, checkpoint=folder / "carried.pt", resume=True)
    assert len(resumed["losses"]) == UPDATES


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "seeds": r"seed to be the same in all 2 processes, got 3 in process 0 and 4 in process 1",
        "options": r"options to be the same in all 2 processes, got .*'clip': 1\.0.* in process 0 .*'clip': 2\.0",
        "examples": r"examples to be the same in all 2 processes, got 26 in process 0 and 25 in process 1",
        "methods": r"method to be the same.*FreeLB\(steps=2.*FreeLB\(steps=3",
        "tasks": r"adversarial_tasks to be the same.*\['a'\] in process 0 and \['b'\] in process 1",
        "resume": r"resume to be the same.*True, 'OneFile'.*False, 'OneFile'",
        "files": r"what to resume from to be the same in all 2 processes, got .*only0\.pt.* 6\).*None",
        "newer": r"format 2 in .*newer\.pt', got format 99, written by a newer advvl",
        "truncated": r"whole PyTorch file .*truncated\.pt",
        "empty": r"count\(batch\) of 1 or more in each part of an update, got less in 1",
        "uncounted": r"one loss per row \(B,\), or count=",
        "too small": r"2 processes times 4 micro-batches, got 6",
    }.items(),
)
def test_processes_that_cannot_train_together_all_say_why(folder: Path, name: str, said: str) -> None:
    for result in of(folder, "pair"):
        assert re.search(said, result[name], re.DOTALL), result[name]


@pytest.mark.parametrize("name", POLICIES)
def test_a_loss_of_one_process_that_is_not_finite_stops_all_and_names_its_examples(folder: Path, name: str) -> None:
    update = next(u for u in range(UPDATES) if POISONED in examples_of(u, EXAMPLES, 6, 3))
    assert update > 0
    parts = 4 if "micro-batches" in name else 2
    whole = examples_of(update, EXAMPLES, 6, 3)
    (guilty,) = [whole[part::parts] for part in range(parts) if POISONED in whole[part::parts]]
    for result in of(folder, "pair"):
        assert f"loss in update {update}, got nan of the examples {guilty}" in result[f"{name} raises"]
    assert not (folder / f"raise {name}.pt").exists()


@pytest.mark.parametrize("name", SKIPPABLE)
def test_an_update_is_skipped_by_all_processes_or_by_none(folder: Path, name: str) -> None:
    arguments = {key: value for key, value in POLICIES[name].items() if key != "accumulate"}
    expected = case(**arguments, source=Source(poison=POISONED), nonfinite="skip")
    assert expected["skipped"] == 2
    assert sum(loss != loss for loss in expected["losses"]) == 2
    for result in of(folder, "pair"):
        assert result[f"{name} skips"]["skipped"] == 2
        assert_close(result[f"{name} skips"], expected)
    first, second = of(folder, "pair")
    torch.testing.assert_close(
        first[f"{name} skips"]["parameters"], second[f"{name} skips"]["parameters"], rtol=0, atol=0
    )


def test_the_main_process_alone_writes_by_its_own_clock_and_judgement(folder: Path) -> None:
    """A tick of the clock at each look, one an update: a checkpoint every second update, and the first best score."""
    main, other = of(folder, "pair")
    assert other["writes"] == []
    assert main["judged"]["scores"] == other["judged"]["scores"] == {3: 3.0, 6: 3.0, 8: 3.0}
    assert [int(name[7:-3]) for name in main["writes"]][-1] == 8
    assert 3 in Checkpoints(directory=folder / "many").files()
    assert len(main["writes"]) < UPDATES


@pytest.mark.parametrize("group", ["dying in an update", "dying in a write"])
def test_where_a_process_dies_the_others_end_too(folder: Path, group: str) -> None:
    ends = json.loads((folder / "ends.json").read_text())[group]
    dead = 1 if group == "dying in an update" else 0
    assert ends[dead] == -signal.SIGKILL
    assert ends[1 - dead] == 1, "it neither went on nor waited for ever"


@pytest.mark.parametrize(("name", "done"), [("update", 5), ("write", 3)])
def test_what_a_dead_process_left_is_resumed_to_the_same_bits(folder: Path, name: str, done: int) -> None:
    expected = of(folder, "pair")[0]["dropout uninterrupted"]
    for result in of(folder, "taking up"):
        assert_equal(result[name], expected)
        assert len(result[name]["asked"]) == UPDATES - done
