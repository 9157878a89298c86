"""CAT, LAT, embedding attacks and circuit breakers are, in float64, the published objectives written out as plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.counting import Flops
from support.loops import agree_on_deltas, stepped
from support.plain import agree, agree_on_gradients, gradients_of
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import L2, PGD, Adapter, AdversarialTraining, Ascent, Attack, EmbeddingPerturber, FreeLB, Frozen, Place, Site
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.maximizers import Held
from advvl.perturbers import Paired
from advvl.recipes import capo, cat, circuit_breakers, embedding_attack, er_cat, lat
from advvl.recipes.answers import (
    Answers,
    answers,
    away,
    cross_entropy,
    forcing,
    ipo,
    of_pairs,
    prompts,
    toward,
    unlikely,
)

WIDTH, WORDS, LENGTH = 6, 11, 7


class Decoder(nn.Module):
    """A causal model of two layers; `deltas` are added to the embedded words and to the first layer's output."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        deltas: dict[str, Tensor] | None = None,
        **others: Tensor,
    ) -> dict[str, Tensor]:
        deltas = deltas or {}
        hidden = self.words(input_ids) + deltas.get("text", 0)
        hidden = torch.tanh(self.first(_before(hidden, attention_mask))) + deltas.get("hidden", 0)
        hidden = self.dropout(torch.tanh(self.second(_before(hidden, attention_mask))))
        return {"logits": self.head(hidden)}


def _before(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the real positions up to each."""
    real = mask.unsqueeze(-1).to(hidden)
    return (hidden * real).cumsum(1) / real.cumsum(1).clamp(min=1)


class Latent(Decoder):
    """The same, with the perturbed hidden states behind a module of their own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.latent = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = self.latent(torch.tanh(self.first(_before(self.words(input_ids), attention_mask))))
        hidden = self.dropout(torch.tanh(self.second(_before(hidden, attention_mask))))
        return {"logits": self.head(hidden)}


SITES = {"text": Site("words", mask=prompts), "hidden": Site("latent", mask=prompts)}


def ours_and_theirs(dropout: float = 0.0) -> tuple[Adapter, Decoder]:
    torch.manual_seed(0)
    ours = Latent(dropout).double()
    theirs = Decoder(dropout).double()
    theirs.load_state_dict(ours.state_dict())
    return Adapter(ours, SITES), theirs


def pairs(count: int = 3) -> dict[str, Tensor]:
    """Prompts of 2 to 4 tokens, each with an answer to shun and one to give, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (2 * count, LENGTH), generator=generator)
    asked = torch.tensor([2, 3, 4])[torch.arange(2 * count) % count % 3]
    ends = asked + torch.cat([torch.full((count,), 2), torch.tensor([3, 1, 2])[torch.arange(count) % 3]])
    places = torch.arange(LENGTH)
    mask = places < ends[:, None]
    ids[count:] = torch.where(places < asked[count:, None], ids[:count], ids[count:])
    labels = torch.where(mask & (places >= asked[:, None]), ids, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def token_logps(logits: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """The log-probabilities of each row's answer, token by token."""
    found = []
    for row in range(len(logits)):
        at = [t for t in range(1, LENGTH) if batch["labels"][row, t] != -100]
        logps = logits[row].log_softmax(-1)
        found.append(torch.stack([logps[t - 1, batch["labels"][row, t]] for t in at]))
    return found


def ce(logps: list[Tensor]) -> Tensor:
    return torch.stack([-row.mean() for row in logps])


def not_likely(logps: list[Tensor]) -> Tensor:
    return torch.stack([torch.where(row < -5, 0.0, -(1 - row.exp()).log()).mean() for row in logps])


def into_balls(delta: Tensor, radius: float) -> Tensor:
    sizes = delta.norm(dim=-1, keepdim=True)
    return delta * (radius / sizes.clamp(min=1e-300)).clamp(max=1)


def twice(delta: Tensor) -> Tensor:
    return torch.cat([delta, delta])


DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.3])


@DROPOUTS
@pytest.mark.parametrize("radius", [0.05, 1.0])
def test_cat(radius: float, dropout: float) -> None:
    """Signs down the cross-entropy of the harmful answer, L2 per token, on prompts alone; away and toward under one δ."""
    batch, step_size, steps = pairs(), 0.02, 4
    ours, theirs = ours_and_theirs(dropout)
    torch.manual_seed(7)
    passes = stepped(cat(radius=radius, step_size=step_size, steps=steps), ours, batch)

    torch.manual_seed(7)
    asked = ((batch["labels"] == -100) & (batch["attention_mask"] == 1))[:3].unsqueeze(-1)
    delta, deltas = torch.zeros(3, LENGTH, WIDTH, dtype=torch.float64), []
    for _ in range(steps):
        deltas.append(twice(delta))
        leaf = delta.clone().requires_grad_()
        logps = token_logps(theirs(**batch, deltas={"text": twice(leaf)})["logits"], batch)
        (gradient,) = torch.autograd.grad(ce(logps)[:3].mean(), leaf)
        delta = into_balls(delta - step_size * gradient.sign() * asked, radius)
    agree_on_deltas(passes, "text", [*deltas, twice(delta)])
    loss = ce(token_logps(theirs(**batch, deltas={"text": twice(delta)})["logits"], batch))
    far, near = -loss[:3], loss[3:]
    far = torch.where(far < -5, -5 + 0.001 * far, far)
    near = torch.where(near < 0.5, 0.5 + 0.001 * near, near)
    agree_on_gradients(ours.model, _named_alike(ours.model, gradients_of(0.5 * far.mean() + 0.5 * near.mean(), theirs)))


@DROPOUTS
@pytest.mark.parametrize("given", ["matrix", "function"])
def test_er_cat(given: str, dropout: float) -> None:
    """CAT's update plus λ times the variance of the singular values, here the roots of the eigenvalues of WᵀW."""
    batch, options, weight = pairs(), {"radius": 1.0, "step_size": 0.02, "steps": 4}, 0.7
    ours, theirs = ours_and_theirs(dropout)
    asked: list[bool] = []

    def table() -> Tensor:
        asked.append(torch.is_grad_enabled())
        matrix: Tensor = ours.model.get_parameter("words.weight")
        return matrix

    torch.manual_seed(7)
    passes = stepped(er_cat(table if given == "function" else table(), weight=weight, **options), ours, batch)
    assert asked == [True]  # once per update: no move computes it
    plain, _ = ours_and_theirs(dropout)
    torch.manual_seed(7)
    agree_on_deltas(passes, "text", [seen.deltas["text"] for seen in stepped(cat(**options), plain, batch)])

    squares = torch.linalg.eigvalsh(theirs.words.weight.T @ theirs.words.weight)
    penalty = weight * (squares.mean() - squares.sqrt().mean() ** 2)
    expected = gradients_of(penalty, theirs)
    assert expected["words.weight"].abs().max() > 1e-2
    for name, parameter in plain.model.named_parameters():
        expected[name] += torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    agree_on_gradients(ours.model, _named_alike(ours.model, expected))
    both = [report.loss for report in (method.step(target, batch) for method, target in _pair(options, weight))]
    agree(both[1] - both[0], penalty.detach(), 1e-9)


def _pair(options: dict[str, Any], weight: float) -> Iterator[tuple[AdversarialTraining, Adapter]]:
    """CAT and ER-CAT, each with a model of its own."""
    for regularised in (False, True):
        target, _ = ours_and_theirs()
        matrix = target.model.get_parameter("words.weight")
        yield er_cat(matrix, weight=weight, **options) if regularised else cat(**options), target


@pytest.mark.parametrize("table", [None, 3, torch.zeros(5, requires_grad=True), torch.eye(3)])
def test_er_cat_refuses_what_is_no_matrix_that_trains(table: Any) -> None:
    ours, _ = ours_and_theirs()
    with pytest.raises(ConfigurationError, match=r"table as a matrix .V, D. that requires gradients, got .*; train it"):
        er_cat(table, radius=1.0, steps=1).step(ours, pairs())
    with pytest.raises(ConfigurationError, match="weight as a finite number above 0, got 0"):
        er_cat(table, radius=1.0, weight=0)


@DROPOUTS
@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_capo(beta: float, dropout: float) -> None:
    """The perturbation of CAT; then (h − 1/(2β))², h the difference of the answers' log-ratios to a reference."""
    batch, radius, step_size, steps = pairs(), 1.0, 0.02, 4
    ours, theirs = ours_and_theirs(dropout)
    torch.manual_seed(1)
    reference = Decoder().double()
    with torch.no_grad():
        given = {**batch, "reference_logps": forcing(reference(**batch), batch)}
        expected = -ce(token_logps(reference(**batch)["logits"], batch))
    agree(given["reference_logps"], expected)
    torch.manual_seed(7)
    target = Adapter(ours.model, SITES, call=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]))
    method = capo(radius=radius, step_size=step_size, steps=steps, beta=beta)
    passes = stepped(method, target, given)

    torch.manual_seed(7)
    asked = ((batch["labels"] == -100) & (batch["attention_mask"] == 1))[:3].unsqueeze(-1)
    delta = torch.zeros(3, LENGTH, WIDTH, dtype=torch.float64)
    for _ in range(steps):
        leaf = delta.clone().requires_grad_()
        logps = token_logps(theirs(**batch, deltas={"text": twice(leaf)})["logits"], batch)
        (gradient,) = torch.autograd.grad(ce(logps)[:3].mean(), leaf)
        delta = into_balls(delta - step_size * gradient.sign() * asked, radius)
    agree(passes[-1].deltas["text"], twice(delta))
    ratios = -ce(token_logps(theirs(**batch, deltas={"text": twice(delta)})["logits"], batch)) - expected
    loss = sum((ratios[3 + row] - ratios[row] - 1 / (2 * beta)) ** 2 for row in range(3)) / 3
    agree_on_gradients(target.model, _named_alike(target.model, gradients_of(loss, theirs)))  # type: ignore[arg-type]


def preferences(rows: int, reference: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The outputs, with a graph, and the batch that a loss over pairs reads."""
    torch.manual_seed(3)
    logits = torch.randn(rows, 5, WORDS, dtype=torch.float64, requires_grad=True)
    return {"logits": logits}, {"labels": torch.randint(0, WORDS, (rows, 5)), "reference_logps": reference}


def test_ipo_of_no_pairs_is_zero_with_a_graph() -> None:
    outputs, batch = preferences(0, torch.zeros(0, dtype=torch.float64))
    loss = ipo(0.25)(outputs, batch)
    assert loss.item() == 0
    loss.backward()
    assert outputs["logits"].grad is not None


def test_ipo_of_an_odd_number_of_rows_names_the_rows() -> None:
    outputs, batch = preferences(3, torch.zeros(3))
    for loss in (ipo(0.25), of_pairs(away, toward)):
        with pytest.raises(DataError, match="expected a batch of pairs, got 3 rows"):
            loss(outputs, batch)


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_ipo_refuses_a_reference_that_is_not_finite(wrong: float) -> None:
    outputs, batch = preferences(4, torch.tensor([0.0, wrong, 0.0, wrong]))
    with pytest.raises(DataError, match=r"expected finite reference_logps, got others in rows \[1, 3\]"):
        ipo(0.25)(outputs, batch)


def test_ipo_gives_the_reference_no_gradient() -> None:
    reference = torch.randn(4, dtype=torch.float64, requires_grad=True)
    outputs, batch = preferences(4, reference)
    ipo(0.25)(outputs, batch).backward()
    assert reference.grad is None
    assert outputs["logits"].grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("reference", [None, torch.zeros(3), torch.zeros(6, 1)])
def test_capo_without_a_reference_for_each_answer_is_refused(reference: Any) -> None:
    ours, _ = ours_and_theirs()
    target = Adapter(ours.model, SITES, call=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]))
    with pytest.raises(DataError, match=r"expected pairs with reference_logps \(6,\), got"):
        capo(radius=1.0).step(target, {**pairs(), "reference_logps": reference})
    for beta in (0.0, math.inf, "x"):
        with pytest.raises(ConfigurationError, match="beta"):
            capo(radius=1.0, beta=beta)  # type: ignore[arg-type]


def _named_alike(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: found[name] for name, _ in model.named_parameters()}


def test_the_attack_of_cat_leaves_no_gradient_in_the_update() -> None:
    """Published until 2025: the attack's backwards left parameter gradients, which entered the update."""
    batch, radius, step_size = pairs(), 1.0, 0.02
    ours, theirs = ours_and_theirs()
    during: list[bool] = []
    ours.model.head.weight.register_post_accumulate_grad_hook(lambda _: during.append(True))
    method = cat(radius=radius, step_size=step_size, steps=4)
    passes = stepped(method, ours, batch)
    assert during == [True]  # of the last pass alone

    delta = passes[-1].deltas["text"]
    loss = of_pairs(away, toward)(theirs(**batch, deltas={"text": delta}), batch).mean()
    right = gradients_of(loss, theirs)
    agree_on_gradients(ours.model, right)
    leaked = dict(right)
    for seen in passes[:-1]:
        climb = ce(token_logps(theirs(**batch, deltas=dict(seen.deltas))["logits"], batch))[:3].mean()
        leaked = {name: leaked[name] + gradient for name, gradient in gradients_of(climb, theirs).items()}
    with pytest.raises(AssertionError, match="differ by"):
        agree_on_gradients(ours.model, leaked)


@DROPOUTS
def test_lat(dropout: float) -> None:
    """Adam toward the harmful answer and away from the safe one; δ is held for the updates, whose loss is the reverse."""
    batch, radius, step_size, steps, updates = pairs(), 0.3, 0.1, 5, 3
    ours, theirs = ours_and_theirs(dropout)
    mine, their = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours.model, theirs))
    gradients: list[dict[str, Tensor]] = []

    def update() -> None:
        gradients.append({n: p.grad.clone() for n, p in ours.model.named_parameters() if p.grad is not None})
        mine.step()
        mine.zero_grad()

    torch.manual_seed(7)
    method = lat(radius=radius, step_size=step_size, steps=steps, updates=updates)
    passes = stepped(method, ours, batch, update=update)

    torch.manual_seed(7)
    asked = ((batch["labels"] == -100) & (batch["attention_mask"] == 1))[:3].unsqueeze(-1)
    delta = torch.zeros(3, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    adam, deltas = torch.optim.Adam([delta], lr=step_size), []
    for _ in range(steps):
        deltas.append(twice(delta.detach().clone()))
        logps = token_logps(theirs(**batch, deltas={"hidden": twice(delta)})["logits"], batch)
        loss = 0.5 * ce(logps)[:3].mean() + 0.5 * not_likely(logps)[3:].mean()
        (delta.grad,) = torch.autograd.grad(loss, delta)
        delta.grad.mul_(asked)
        adam.step()
        with torch.no_grad():
            delta.copy_(into_balls(delta, radius))
    held = twice(delta.detach())
    assert asked.expand_as(delta)[~asked.expand_as(delta)].numel()
    agree_on_deltas(passes, "hidden", [*deltas, *[held] * updates])
    for number in range(updates):
        logps = token_logps(theirs(**batch, deltas={"hidden": held})["logits"], batch)
        found = gradients_of(0.5 * not_likely(logps)[:3].mean() + 0.5 * ce(logps)[3:].mean(), theirs)
        for name, gradient in found.items():
            agree(gradients[number].get(name, torch.zeros_like(gradient)), gradient, least=1e-3)
            theirs.get_parameter(name).grad = gradient
        their.step()


def test_embedding_attack() -> None:
    """Adam in balls and steps of mean norms of the prompt; the model comes back as it was."""
    batch, radius, step_size, steps = pairs(), 0.4, 0.1, 6
    ours, theirs = ours_and_theirs()
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    attack = embedding_attack(radius=radius, step_size=step_size, steps=steps)
    result = attack(ours, batch)

    asked = ((batch["labels"] == -100) & (batch["attention_mask"] == 1)).unsqueeze(-1)
    embedded = theirs.words(batch["input_ids"]).detach()
    unit = ((embedded.norm(dim=-1, keepdim=True) * asked).sum(1) / asked.sum(1)).unsqueeze(1)
    scaled = torch.zeros_like(embedded, requires_grad=True)  # δ in its unit
    adam = torch.optim.Adam([scaled], lr=step_size)
    for _ in range(steps):
        leaf = (scaled.detach() * unit).requires_grad_()
        logps = token_logps(theirs(**batch, deltas={"text": leaf})["logits"], batch)
        (gradient,) = torch.autograd.grad(ce(logps).sum(), leaf)
        scaled.grad = gradient * asked
        adam.step()
        with torch.no_grad():
            scaled.copy_(into_balls(scaled, radius))
    delta = scaled.detach() * unit
    agree(result.deltas["text"], delta)
    with torch.no_grad():
        forced = ce(token_logps(theirs(**batch, deltas={"text": delta})["logits"], batch))
        clean = ce(token_logps(theirs(**batch)["logits"], batch))
    assert result.losses is not None
    agree(result.losses, -forced)
    assert (forced < clean).all()
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())


# ---- circuit breakers -------------------------------------------------------------------------------------------------


def harmful(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"] != -100


def retained(batch: dict[str, Tensor]) -> Tensor:
    return batch["retain"]


def breaking_batch() -> dict[str, Tensor]:
    batch = pairs()
    batch["retain"] = (batch["attention_mask"] == 1) & (torch.arange(6) >= 3).unsqueeze(1)
    batch["labels"][3:] = -100
    return batch


def call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def with_lora(*, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        Decoder().double(), LoraConfig(target_modules=["first", "second"], lora_dropout=dropout)
    ).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_circuit_breakers(progress: float) -> None:
    """α(1 − t/2) relu cos at harmful tokens, α t/2 ‖·‖ at retained ones, to the hidden states with the adapter off."""
    batch, alpha = breaking_batch(), 5.0
    ours, theirs = with_lora(), with_lora()
    layers = ["first", "second"]
    method = circuit_breakers(layers, harmful=harmful, retained=retained, progress=progress, alpha=alpha)
    target = Adapter(ours, {"text": Site("words")}, call=call)
    report = method.step(target, batch)

    def hidden(model: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(f"base_model.model.{name}").register_forward_hook(
                lambda module, args, output, name=name: seen.__setitem__(name, output)
            )
            for name in layers
        ]
        call(model, batch)
        for handle in handles:
            handle.remove()
        return seen

    with theirs.disable_adapter(), torch.no_grad():
        origin = hidden(theirs)
    here, loss = hidden(theirs), torch.zeros((), dtype=torch.float64)
    bad, good = harmful(batch), retained(batch)
    assert bad.any(1).tolist() == [True] * 3 + [False] * 3
    for name in layers:
        cosine = torch.stack(
            [(a @ b) / (a.norm() * b.norm()) for a, b in zip(here[name][bad], origin[name][bad], strict=True)]
        )
        distance = (here[name][good] - origin[name][good]).norm(dim=1)
        rerouted, kept = cosine.clamp(min=0).mean(), distance.mean()
        loss = loss + (alpha * (1 - progress / 2) * rerouted + alpha * progress / 2 * kept) / len(layers)
    agree(report.loss, loss.detach())
    names = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, [theirs.get_parameter(name) for name in names])
    for name, gradient in zip(names, expected, strict=True):
        agree(ours.get_parameter(name).grad, gradient, least=1e-3)


def test_circuit_breakers_run_one_pass_and_one_with_the_adapter_off() -> None:
    model, seen = with_lora(), []
    lora = model.get_submodule("base_model.model.first")
    model.get_submodule("base_model.model.head").register_forward_hook(lambda *_: seen.append(lora.disable_adapters))
    target = Adapter(model, {"text": Site("words")}, call=call)
    circuit_breakers(["first", "second"], harmful=harmful, retained=retained, progress=0.5).step(
        target, breaking_batch()
    )
    assert sorted(seen) == [False, True]


def test_circuit_breakers_at_the_start_of_training_have_a_finite_gradient() -> None:
    """The adapter changes nothing yet: the distance is exactly zero, where a norm has no derivative."""
    model = with_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    target = Adapter(model, {"text": Site("words")}, call=call)
    circuit_breakers(["first", "second"], harmful=harmful, retained=retained, progress=0.5).step(
        target, breaking_batch()
    )
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_without_an_adapter_circuit_breakers_say_so_and_take_a_copy() -> None:
    ours, _ = ours_and_theirs()
    target = Adapter(ours.model, {"text": Site("words")}, call=call)
    given: Any = {"harmful": harmful, "retained": retained, "progress": 0.5}
    with pytest.raises(ConfigurationError, match=r"PEFT model for AdapterOff.*use Frozen.copy_of"):
        circuit_breakers(["first"], **given).step(target, breaking_batch())
    copied = circuit_breakers(["first"], **given, reference=Frozen.copy_of(ours.model))
    assert copied.step(target, breaking_batch()).regularization is not None


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan"), "half", True])
def test_progress_is_a_share(progress: Any) -> None:
    with pytest.raises(ConfigurationError, match="progress as the share of training done"):
        circuit_breakers(["first"], harmful=harmful, retained=retained, progress=progress)


# ---- answers and pairs ------------------------------------------------------------------------------------------------


def test_a_batch_without_an_answer_in_some_row_is_refused_with_the_row() -> None:
    ours, _ = ours_and_theirs()
    for method in (cat(radius=1.0), lat(updates=1)):
        batch = pairs()
        batch["labels"][[1, 4]] = -100
        with pytest.raises(DataError, match=r"in each row, got none in rows \[1, 4\]"):
            method.step(ours, batch, update=ours.model.zero_grad)
    with pytest.raises(DataError, match=r"got none in rows \[1, 4\]"):
        embedding_attack(steps=1)(ours, batch)


def test_rows_that_are_no_pairs_are_refused() -> None:
    ours, _ = ours_and_theirs()
    odd = {name: value[:5] for name, value in pairs().items()}
    with pytest.raises(ShapeError, match="two halves of rows at the site of 'text', got 5"):
        cat(radius=1.0).step(ours, odd)
    with pytest.raises(DataError, match="expected a batch of pairs, got 5 rows"):
        of_pairs(cross_entropy, None)(ours.forward(odd), odd)
    left = pairs()
    left["labels"][4] = left["labels"][4].roll(1)  # its answer begins later than that of row 1
    with pytest.raises(
        ShapeError, match=r"real at the same positions, got others in rows \[1\]; pad answers on the right"
    ):
        cat(radius=1.0).step(ours, left)


def _of(logps: Tensor, counts: Tensor) -> Answers:
    """Answers of two words, of which the first has these log-probabilities."""
    logits = torch.stack([logps, torch.log(-torch.expm1(logps))], -1)
    return Answers(logits, torch.where(counts, 0, -100))


def test_losses_of_answers_are_what_they_say() -> None:
    logps = torch.tensor([[-0.1, -9.0, -1.0], [-2.0, -4.0, -7.0]], dtype=torch.float64)
    counts = torch.tensor([[True, True, False], [True, True, True]])
    found = _of(logps, counts)
    agree(cross_entropy(found), torch.tensor([4.55, 13 / 3], dtype=torch.float64))
    agree(
        away(_of(2 * logps, counts)),
        torch.tensor([-5 - 0.001 * 9.1, -5 - 0.001 * 26 / 3], dtype=torch.float64),
    )
    agree(away(found), -cross_entropy(found))
    agree(toward(_of(logps / 20, counts)), 0.5 + 0.001 * cross_entropy(found) / 20)
    terms = -(1 - logps.exp()).log()
    agree(unlikely(found), torch.stack([terms[0, 0] / 2, (terms[1, 0] + terms[1, 1]) / 3]))


@pytest.mark.parametrize("gap", [10.0, 17.0, 30.0, 200.0])
def test_a_certain_token_is_as_unlikely_as_its_logit_and_no_less(gap: float) -> None:
    logits = torch.tensor([[[gap, 0.0, 0.0], [gap, 0.0, 0.0]]], requires_grad=True)
    loss = unlikely(Answers(logits, torch.tensor([[0, 0]])))
    torch.testing.assert_close(loss, torch.tensor([gap - math.log(2)]), rtol=1e-4, atol=0)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(2 * logits.grad[0, 0], torch.tensor([1.0, -0.5, -0.5]), rtol=1e-3, atol=0)


def test_the_likelihood_of_an_answer_is_that_of_a_decoders_own_loss() -> None:
    ours, _ = ours_and_theirs()
    batch = pairs()
    outputs = ours.forward(batch)
    found = answers(outputs, batch)
    mean = -found.logps.sum() / found.counts.sum()
    agree(mean, F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))


def test_half_precision_logits_are_compared_wide() -> None:
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0)).half()
    batch = {"labels": torch.tensor([[-100, 3, 4, -100], [-100, -100, 2, 1]])}
    assert answers({"logits": logits}, batch).logps.dtype == torch.float32


# ---- the parts they are made of ---------------------------------------------------------------------------------------


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def test_a_held_perturbation_costs_a_pass_an_update() -> None:
    ours, _ = ours_and_theirs()
    updates: list[int] = []
    with counted(ours.model) as forwards:
        report = lat(steps=6, updates=4).step(ours, pairs(), update=lambda: (updates.append(1), ours.model.zero_grad()))
    assert (len(forwards), len(updates), report.passes) == (10, 4, 10)


def test_holding_for_one_update_is_the_maximiser_itself() -> None:
    found = []
    for maximizer in (PGD(3), Held(PGD(3), 1)):
        ours, _ = ours_and_theirs()
        method = lat(updates=1)
        stepped(type(method)(method.perturber, maximizer, climb=method.climb, teach=method.teach), ours, pairs())
        found.append([p.grad for p in ours.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("maximizer", [FreeLB(3), PGD(3, modalities="in turn"), "PGD"])
def test_only_what_teaches_at_its_end_can_be_held(maximizer: Any) -> None:
    ascent = Ascent(L2(1.0), step_size=0.1)
    with pytest.raises(ConfigurationError, match="teaches at its end alone"):
        AdversarialTraining(EmbeddingPerturber(text=ascent, image=ascent), Held(maximizer, 2))


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_a_perturbation_is_held_for_a_number_of_updates(count: Any) -> None:
    with pytest.raises(ConfigurationError, match="count to be a whole number of 1 or more"):
        Held(PGD(3), count)


def test_updates_without_an_update_function_are_refused() -> None:
    ours, _ = ours_and_theirs()
    with pytest.raises(ConfigurationError, match="expected update=… for 4 updates a step"):
        lat().step(ours, pairs())


def test_pairs_share_one_perturbation_with_both_rows_gradients() -> None:
    paired = Paired(EmbeddingPerturber(text=Ascent(L2(), step_size=1.0, rule="sign")))
    x = torch.zeros(4, 2, 3)
    place = Place(x)
    delta = torch.randn(4, 2, 3, requires_grad=True)
    paired.apply("text", place, x, delta).mul(torch.arange(4.0).reshape(4, 1, 1)).sum().backward()
    assert delta.grad is not None
    assert delta.grad[:, 0, 0].tolist() == [0 + 2, 1 + 3, 0 + 2, 1 + 3]
    moved, _ = paired.move({"text": torch.zeros(4, 2, 3)}, {"text": delta.grad}, {"text": place}, {})
    assert torch.equal(moved["text"], torch.ones(4, 2, 3))


def test_pairs_start_alike() -> None:
    from advvl import Normal

    paired = Paired(EmbeddingPerturber(text=Ascent(L2(), step_size=1.0, start=Normal(1.0))))
    delta = paired.begin("text", paired.starts()["text"], Place(torch.zeros(4, 2, 3)), torch.Generator().manual_seed(0))
    assert delta.any()
    assert torch.equal(delta[:2], delta[2:])


def test_an_empty_batch_of_pairs_works() -> None:
    ours, _ = ours_and_theirs()
    empty = {name: value[:0] for name, value in pairs().items()}
    cat(radius=1.0).step(ours, empty)


def test_an_attack_with_pairs_is_as_its_inner_one_says() -> None:
    ours, _ = ours_and_theirs()
    method = cat(radius=1.0, step_size=0.1)
    result = Attack(method.perturber, PGD(20), loss=method.climb.loss)(ours, pairs())  # type: ignore[union-attr]
    assert torch.equal(result.deltas["text"][:3], result.deltas["text"][3:])
    assert result.moved["text"].all()
    assert not result.unmoved["text"].any()


@pytest.mark.parametrize("maximizer", [PGD(3, keep="best"), PGD(3, early_stop=True)])
def test_rows_that_share_a_perturbation_choose_none_alone(maximizer: PGD) -> None:
    method = cat(radius=1.0)
    with pytest.raises(ConfigurationError, match="rows that share a perturbation"):
        Attack(method.perturber, maximizer)
    with pytest.raises(ConfigurationError, match="rows that share a perturbation"):
        AdversarialTraining(method.perturber, maximizer)


class Tall(nn.Module):
    """Twelve layers, of which the ninth's output is the site."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.head = nn.Linear(64, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return {"logits": self.head(hidden)}


def test_latent_training_costs_what_it_cannot_do_without() -> None:
    """What lies below the site once for all moves: N moves of three layers and the head, M updates of all."""
    model, batch, steps, updates = Tall().eval(), pairs(), 16, 4
    target = Adapter(model, {"hidden": Site("layers.8", mask=prompts)}, pure=True)
    with Flops() as counted_here:
        lat(steps=steps, updates=updates).step(target, batch, update=model.zero_grad)
    positions = batch["input_ids"].numel()
    layer, head = 2 * positions * 64 * 64, 2 * positions * 64 * WORDS
    below, above, whole = 9 * layer, 3 * layer + head, 12 * layer + head
    unavoidable = below + steps * 2 * above + updates * 3 * whole
    assert counted_here.total <= 1.05 * unavoidable
