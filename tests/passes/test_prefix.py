"""What runs before the first site of an attack: once for all its passes, and only where that changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.compare import close
from support.uniter_batches import uniter_batch
from torch import Tensor, nn

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    AttackResult,
    EmbeddingPerturber,
    FreeLB,
    InnerMaximizer,
    Site,
    adapt,
)
from advvl.maximizers import Held
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.vqa import UniterForVQA


class Layer(nn.Module):
    """Counts how often it is run."""

    def __init__(self, runs: Counter[str], name: str) -> None:
        super().__init__()
        self.linear, self.runs, self.name = nn.Linear(6, 6), runs, name

    def forward(self, x: Tensor) -> Tensor:
        self.runs[self.name] += 1
        return x + torch.tanh(self.linear(x))


class Deep(nn.Module):
    """Layers a, b, c, d one after another, the first two in a module of their own; `again` is run before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()
        self.lower = nn.Sequential(Layer(self.runs, "a"), Layer(self.runs, "b"))
        self.c, self.d, self.again = (Layer(self.runs, name) for name in ("c", "d", "again"))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.again(self.c(self.changed(self.lower(self.again(x)))))
        logits = self.head(self.d(hidden).mean(1))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels, reduction="none")}

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden


class Overwrites(Deep):
    """Changes a layer's output in place."""

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden.mul_(2.0)


def attacked(
    kind: type[Deep], site: str | Site, maximizer: InnerMaximizer, **options: bool
) -> tuple[AttackResult, Counter[str], Deep]:
    torch.manual_seed(0)
    model = kind().double()
    batch = {"x": torch.randn(4, 2, 6, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 0])}
    attack = Attack(EmbeddingPerturber(hidden=Ascent(L2(1.0), step_size=0.4)), maximizer, **options)
    result = attack(Adapter(model, {"hidden": site}, pure=True), batch)
    return result, model.runs, model


@pytest.mark.slow
@pytest.mark.parametrize("maximizer", [PGD(4), PGD(4, keep="best"), FreeLB(4)], ids=repr)
@pytest.mark.parametrize("site", ["c", "c:input", "d:input", "lower.1", Site("again", firing=0)], ids=str)
@pytest.mark.parametrize("kind", [Deep, Overwrites])
def test_an_attack_finds_the_same_with_and_without(
    kind: type[Deep], site: str | Site, maximizer: InnerMaximizer
) -> None:
    with_, _, model = attacked(kind, site, maximizer)
    without, _, _ = attacked(kind, site, maximizer, train_mode=True)  # the model has nothing that training changes
    close(with_.deltas["hidden"], without.deltas["hidden"])
    close(with_.losses, without.losses)
    assert "forward" not in {name for module in model.modules() for name in vars(module)}
    assert not any(module._forward_hooks for module in model.modules() if not isinstance(module, Layer))


def test_what_lies_below_the_site_runs_once() -> None:
    _, runs, _ = attacked(Deep, "c:input", PGD(4))
    assert runs == {"a": 1, "b": 1, "c": 5, "d": 5, "again": 10}, "a module that runs twice is always run"
    _, runs, _ = attacked(Deep, "d:input", PGD(4))
    assert runs == {"a": 1, "b": 1, "c": 1, "d": 5, "again": 10}
    _, runs, _ = attacked(Deep, "lower.1", PGD(4))
    assert runs == {"a": 1, "b": 1, "c": 5, "d": 5, "again": 10}, "what is perturbed after a module leaves it as it is"


def test_it_is_run_again_where_that_may_give_something_else() -> None:
    _, runs, _ = attacked(Overwrites, "c:input", PGD(4))
    assert runs["a"] == 1, "its own output was not touched"
    assert runs["b"] == 5, "its output was changed in place, and would be changed again"
    _, runs, _ = attacked(Deep, "c:input", PGD(4), train_mode=True)
    assert runs["a"] == runs["b"] == 5, "what trains may draw"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by dynamo itself
def test_a_compiled_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Deep().double()
    model.lower.compile(backend="eager")
    batch = {"x": torch.randn(4, 2, 6, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 0])}
    Attack(EmbeddingPerturber(hidden=Ascent(L2(1.0), step_size=0.4)), PGD(2))(
        Adapter(model, {"hidden": "c"}, pure=True), batch
    )
    assert model.runs["c"] == 3
    assert model.runs["d"] == 3


def test_the_end_pass_can_be_saved() -> None:
    whole, runs, _ = attacked(Deep, "c:input", PGD(4))
    short, fewer, _ = attacked(Deep, "c:input", PGD(4), end_pass=False)
    assert (runs["d"], fewer["d"]) == (5, 4)
    assert torch.equal(short.deltas["hidden"], whole.deltas["hidden"])
    assert short.losses is None
    assert whole.losses is not None
    best, runs, _ = attacked(Deep, "c:input", PGD(4, keep="best"), end_pass=False)
    assert runs["d"] == 5, "to choose the best, the last has to be judged"
    assert torch.equal(best.deltas["hidden"], attacked(Deep, "c:input", PGD(4, keep="best"))[0].deltas["hidden"])


def test_nothing_is_reused_of_a_model_that_is_not_declared_pure() -> None:
    torch.manual_seed(0)
    model = Deep().double()
    batch = {"x": torch.randn(4, 2, 6, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 0])}
    attack = Attack(EmbeddingPerturber(hidden=Ascent(L2(1.0), step_size=0.4)), PGD(4))
    attack(Adapter(model, {"hidden": "c:input"}), batch)
    assert model.runs["a"] == 5


class Contained(Deep):
    """Hands hidden states on in a dictionary, and replaces an entry of it."""

    def changed(self, hidden: Tensor) -> Tensor:
        found = self.wrap(hidden)
        found["h"] = found["h"] * 2 + 1
        return found["h"]

    def __init__(self) -> None:
        super().__init__()
        self.wrap = Wrap()


class Wrap(nn.Module):
    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"h": hidden * 3}


def test_a_container_is_copied_each_time() -> None:
    with_, runs, _ = attacked(Contained, "c:input", PGD(4))
    without, _, _ = attacked(Contained, "c:input", PGD(4), train_mode=True)
    assert runs["a"] == 1
    close(with_.deltas["hidden"], without.deltas["hidden"])


def test_a_module_with_hooks_is_run_so_that_they_see_what_they_should() -> None:
    torch.manual_seed(0)
    model, seen = Deep().double(), []
    model.lower[0].register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    batch = {"x": torch.randn(4, 2, 6, dtype=torch.float64), "labels": torch.tensor([0, 1, 2, 0])}
    attack = Attack(EmbeddingPerturber(hidden=Ascent(L2(1.0), step_size=0.4)), PGD(4))
    with_ = attack(Adapter(model, {"hidden": "c:input"}, pure=True), batch)
    assert len(seen) == model.runs["a"] == 5
    assert model.runs["b"] == 1
    close(with_.deltas["hidden"], attack(Adapter(model, {"hidden": "c:input"}), batch).deltas["hidden"])


def test_in_turn_every_site_still_fires() -> None:
    """The words' embeddings have finished when the regions are perturbed, and hold a site."""
    target = adapt(UniterForVQA(UniterConfig.tiny(), num_answers=5).double())
    batch = {**uniter_batch(), "targets": torch.rand(4, 5, dtype=torch.float64)}
    parts = EmbeddingPerturber(**{m: Ascent(L2(1.0), step_size=0.4) for m in ("text", "image")}), PGD(3, "in turn")
    plain = Attack(*parts)(target, batch)
    target.pure = True
    for modality, delta in Attack(*parts)(target, batch).deltas.items():
        close(delta, plain.deltas[modality])


# ---- in training: the moves of a step, on a model in eval mode ---------------------------------------------------------


def trained(*, pure: bool, maximizer: InnerMaximizer, training: bool = False) -> tuple[list[Tensor], Counter[str]]:
    """The gradients of two steps with an update between them, and how often each layer ran."""
    torch.manual_seed(0)
    model = Deep().train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ascent = Ascent(L2(1.0), step_size=0.3)
    target = Adapter(model, {"hidden": "c"}, pure=pure)
    method, batch = AdversarialTraining(EmbeddingPerturber(hidden=ascent), maximizer), deep_batch()
    found = []

    def update() -> None:
        found.extend(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        method.step(target, batch, update=update)
    return found, model.runs


def deep_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)), "labels": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("maximizer", [PGD(4), Held(PGD(4), 3), PGD(4, modalities="in turn")], ids=repr)
def test_the_moves_of_a_step_run_what_is_below_the_site_once_and_give_the_same_gradients(
    maximizer: InnerMaximizer,
) -> None:
    plain, all_runs = trained(pure=False, maximizer=maximizer)
    reused, runs = trained(pure=True, maximizer=maximizer)
    assert all(torch.equal(a, b) for a, b in zip(plain, reused, strict=True))
    passes, taught = all_runs["a"] // 2, getattr(maximizer, "count", 1)
    assert passes == 4 + taught
    assert runs == dict.fromkeys(("a", "b", "c"), 2 * (1 + taught)) | {"d": 2 * passes, "again": 4 * passes}


def test_a_pass_that_teaches_runs_all_of_the_model() -> None:
    _, runs = trained(pure=True, maximizer=FreeLB(3))
    assert runs["a"] == runs["d"] == 2 * 3


def test_in_training_mode_nothing_is_reused() -> None:
    _, runs = trained(pure=True, maximizer=PGD(4), training=True)
    assert runs["a"] == 2 * 5


@dataclass(frozen=True)
class Twice(InnerMaximizer):
    """PGD, and then PGD again at the updated weights."""

    @property
    def updates(self) -> int:
        return 2

    def probes(self, perturber: Any, *, generator: Any = None, state: Any = None) -> Any:
        for _ in range(2):
            deltas = yield from PGD(3).probes(perturber, generator=generator, state=state)
        return deltas


def test_what_was_computed_is_forgotten_at_an_update() -> None:
    plain, _ = trained(pure=False, maximizer=Twice())
    reused, runs = trained(pure=True, maximizer=Twice())
    assert all(torch.equal(a, b) for a, b in zip(plain, reused, strict=True))
    assert runs["a"] == 2 * 2 * (1 + 1)
