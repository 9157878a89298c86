"""Attacks find what their parts say, treat rows alike wherever they stand, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compare import close, same
from support.draws import randn
from support.toy import ToyModel, toy, toy_batch, toy_sites
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    AttackResult,
    AutoPGD,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Given,
    InnerMaximizer,
    Linf,
    Normal,
    SymmetricKL,
    Uniform,
    Zero,
)
from advvl.errors import ConfigurationError, DataError

BALLS = [L2(0.6), Linf(0.1), L2(0.3, per="token"), Linf(0.1, per="token")]
MAXIMIZERS = [
    *(PGD(3), PGD(2, "in turn"), PGD(3, keep="best"), PGD(3, early_stop=True), FreeLB(3), FreeLB(2, "in turn")),
    AutoPGD(5),
]
each_ball = pytest.mark.parametrize("ball", BALLS, ids=repr)
each_maximizer = pytest.mark.parametrize("maximizer", MAXIMIZERS, ids=repr)


def correct(outputs: Any, batch: Any) -> Tensor:
    return outputs["logits"].argmax(1) == batch["labels"]


def attack(ball: L2 | Linf, maximizer: InnerMaximizer, **options: Any) -> Attack:
    ascent = Ascent(ball, step_size=0.2, start=options.pop("start", Zero()))
    return Attack(EmbeddingPerturber(text=ascent, image=ascent), maximizer, correct=correct, **options)


# --- what is found ---


@each_ball
@each_maximizer
def test_an_attack_stays_in_its_ball_and_off_the_padding(ball: L2 | Linf, maximizer: InnerMaximizer) -> None:
    batch = toy_batch()
    result = attack(ball, maximizer, start=Uniform(1.0))(toy(), batch)
    for name, mask in {"text": "mask", "image": "region_mask"}.items():
        delta = result.deltas[name]
        rows = delta.flatten(1) if ball.per == "sample" else delta
        norms = rows.norm(dim=-1) if isinstance(ball, L2) else rows.abs().amax(-1)
        assert norms.max() <= ball.radius
        assert delta.any()
        assert not delta[~batch[mask]].any()
        assert not delta.requires_grad


@each_ball
def test_a_short_step_raises_the_loss_of_every_row(ball: L2 | Linf) -> None:
    target, batch = toy(), toy_batch(7)
    clean = target.model(**batch)["loss"]
    ascent = Ascent(ball, step_size=1e-3)
    result = Attack(EmbeddingPerturber(text=ascent, image=ascent), PGD(1))(target, batch)
    assert (result.losses > clean).all()


def test_one_step_of_an_attack_is_the_gradient_of_each_rows_own_loss() -> None:
    target, batch = toy(), toy_batch(7)
    delta = torch.zeros(7, 5, 8, dtype=torch.float64, requires_grad=True)
    with target.inject({"text": delta}):
        (gradient,) = torch.autograd.grad(target.model(**batch)["loss"].sum(), delta)
    gradient = gradient * batch["mask"].unsqueeze(-1)
    result = Attack(EmbeddingPerturber(text=Ascent(L2(), step_size=0.1)), PGD(1))(target, batch)
    close(result.deltas["text"], 0.1 * gradient / gradient.flatten(1).norm(dim=1).reshape(7, 1, 1))


@each_maximizer
def test_what_an_attack_reports_is_what_its_deltas_do(maximizer: InnerMaximizer) -> None:
    target, batch = toy(), toy_batch(7)
    result = attack(L2(2.0), maximizer)(target, batch)
    last = {"image": result.deltas["image"]} if getattr(maximizer, "modalities", None) == "in turn" else result.deltas
    with target.inject(last):
        outputs = target.model(**batch)
    close(result.losses, outputs["loss"])
    assert torch.equal(result.correct, correct(outputs, batch))
    assert not result.losses.requires_grad


def test_the_best_is_no_worse_than_any_step_of_the_way() -> None:
    target, batch = toy(), toy_batch(7)
    step = Ascent(L2(3.0), step_size=1.5)
    best = Attack(EmbeddingPerturber(text=step), PGD(5, keep="best"))(target, batch).losses
    for steps in range(1, 6):
        assert (best >= Attack(EmbeddingPerturber(text=step), PGD(steps))(target, batch).losses - 1e-12).all()


def test_early_stopping_leaves_a_broken_row_where_it_broke() -> None:
    target, batch = toy(), toy_batch(31)
    step = Ascent(L2(), step_size=0.4)
    paths = [Attack(EmbeddingPerturber(text=step), PGD(steps), correct=correct)(target, batch) for steps in range(1, 9)]
    stopped = Attack(EmbeddingPerturber(text=step), PGD(8, early_stop=True), correct=correct)(target, batch)
    clean = correct(target.model(**batch), batch)
    for row in range(31):
        broken = [i for i, path in enumerate(paths) if not path.correct[row]]
        expected = paths[broken[0] if broken else -1].deltas["text"][row] * clean[row]
        close(stopped.deltas["text"][row], expected)
    assert 0 < clean.sum() < 31
    assert stopped.correct.sum() < clean.sum()


def test_a_given_loss_is_what_is_raised() -> None:
    target, batch = toy(), toy_batch()
    step = EmbeddingPerturber(text=Ascent(L2(), step_size=0.01))
    kind = {"down": -1, "up": 1}
    results = {
        name: Attack(step, PGD(1), loss=lambda outputs, batch, s=sign: s * outputs["loss"])(target, batch)
        for name, sign in kind.items()
    }
    close(results["down"].deltas["text"], -results["up"].deltas["text"])
    scalar = Attack(step, PGD(1), loss=lambda outputs, batch: outputs["loss"].sum())(target, batch)
    close(scalar.deltas["text"], results["up"].deltas["text"])
    assert scalar.losses is None
    assert scalar.correct is None


def test_no_parameter_update_is_asked_of_an_attack() -> None:
    target, batch = toy(), toy_batch()
    step = EmbeddingPerturber(text=Ascent(L2(), step_size=0.1))
    replayed = Attack(step, FreeAT(3, carry=False))(target, batch)
    close(replayed.deltas["text"], Attack(step, FreeLB(3))(target, batch).deltas["text"])


def test_an_attack_works_where_gradients_are_off_and_on_frozen_parameters() -> None:
    target, batch = toy(), toy_batch()
    expected = attack(L2(1.0), PGD(2))(target, batch)
    target.model.requires_grad_(False)
    with torch.no_grad():
        got = attack(L2(1.0), PGD(2))(target, batch)
    for name in expected.deltas:
        close(got.deltas[name], expected.deltas[name])
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_an_attack_works_on_any_number_of_rows(rows: int) -> None:
    result = attack(L2(1.0), PGD(2), start=Uniform(0.1))(toy(), toy_batch(rows))
    assert result.deltas["text"].shape == (rows, 5, 8)
    assert result.losses.shape == result.correct.shape == (rows,)


def test_a_half_precision_model_is_attacked_by_deltas_in_single_precision() -> None:
    target, batch = toy(dtype=torch.bfloat16), toy_batch(dtype=torch.bfloat16)
    result = attack(L2(0.5), PGD(2))(target, batch)
    assert {delta.dtype for delta in result.deltas.values()} == {torch.float32}
    assert all(delta.any() for delta in result.deltas.values())


# --- law 3: rows stand alone ---


@each_ball
@each_maximizer
@pytest.mark.parametrize("start", ["zero", "given"])
def test_the_order_of_a_batch_does_not_matter(ball: L2 | Linf, maximizer: InnerMaximizer, start: str) -> None:
    target, batch = toy(), toy_batch(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {name: value[order] for name, value in batch.items()}
    text, image = randn(5, 5, 8, seed=1), randn(5, 4, 5, seed=2)

    def run(rows: Tensor, batch: dict[str, Tensor]) -> Any:
        begins = (Given(text[rows]), Given(image[rows])) if start == "given" else (Zero(), Zero())
        ascents = [Ascent(ball, step_size=0.2, start=begin) for begin in begins]
        return Attack(EmbeddingPerturber(text=ascents[0], image=ascents[1]), maximizer, correct=correct)(target, batch)

    one, two = run(torch.arange(5), batch), run(order, shuffled)
    close(two.losses, one.losses[order])
    assert torch.equal(two.correct, one.correct[order])
    for name in one.deltas:
        close(two.deltas[name], one.deltas[name][order])
    for row in range(5):
        alone = run(torch.tensor([row]), {name: value[row : row + 1] for name, value in batch.items()})
        close(alone.losses[0], one.losses[row])
        for name in one.deltas:
            close(alone.deltas[name][0], one.deltas[name][row])


def test_a_step_that_the_floor_shortens_does_not_depend_on_the_size_of_the_batch() -> None:
    target, batch = toy(), toy_batch(5)
    step = EmbeddingPerturber(text=Ascent(L2(), step_size=0.1, floor=100.0))
    together = Attack(step, PGD(2))(target, batch).deltas["text"]
    for row in range(5):
        alone = Attack(step, PGD(2))(target, {name: value[row : row + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone.deltas["text"][0], together[row], rtol=1e-9, atol=0.0)


@each_ball
@each_maximizer
@pytest.mark.parametrize("padding", [1, 8])
def test_padding_does_not_matter(ball: L2 | Linf, maximizer: InnerMaximizer, padding: int) -> None:
    target, batch = toy(), toy_batch(3)
    longer = {
        "ids": F.pad(batch["ids"], (0, padding), value=7),
        "regions": F.pad(batch["regions"], (0, 0, 0, padding), value=9.0),
        "mask": F.pad(batch["mask"], (0, padding)),
        "region_mask": F.pad(batch["region_mask"], (0, padding)),
        "labels": batch["labels"],
    }
    one, two = attack(ball, maximizer)(target, batch), attack(ball, maximizer)(target, longer)
    close(two.losses, one.losses)
    for name, length in {"text": 5, "image": 4}.items():
        close(two.deltas[name][:, :length], one.deltas[name])
        assert not two.deltas[name][:, length:].any()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=str)
def test_a_row_with_a_broken_gradient_keeps_its_perturbation_and_hurts_no_other(bad: float) -> None:
    target, batch = toy(), toy_batch(4)
    start = Given(0.1 * randn(4, 5, 8))
    step = Attack(EmbeddingPerturber(text=Ascent(L2(), step_size=0.2, start=start)), PGD(3))
    expected = step(target, batch)
    batch["regions"] = batch["regions"].clone()
    batch["regions"][2, 0] = bad
    got = step(target, batch)
    close(got.deltas["text"][2], start.delta[2] * batch["mask"][2].unsqueeze(-1))
    others = [0, 1, 3]
    close(got.deltas["text"][others], expected.deltas["text"][others])


# --- law 7: everything is as it was ---


class Furnished(ToyModel):
    """With everything an attack could disturb: BatchNorms, dropout, buffers that the forward changes."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.also = nn.Sequential(self.frozen)  # another parent, in another mode
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.query.weight.requires_grad_(False)

    def forward(self, ids: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        self.replaced = self.replaced + 1
        hidden = torch.cat([self.words(ids), self.project(regions)], 1)
        hidden = self.frozen(self.norm(self.dropout(self.mix(hidden)).flatten(0, 1))).reshape(hidden.shape)
        logits = self.head(hidden.mean(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def furnished() -> Adapter:
    model = Furnished().double()
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    return Adapter(model, toy_sites())


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as found: values by copy, and the objects themselves."""
    state: dict[str, Any] = {"random": torch.get_rng_state()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = tensor.grad if isinstance(tensor, nn.Parameter) else None
        state[name] = (id(tensor), tensor.requires_grad, tensor.detach().clone())
        state[f"{name}.grad"] = (id(grad), None if grad is None else grad.clone())
    for name, module in model.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        state[f"{name} itself"] = (id(module), module.training, [list(getattr(module, kind)) for kind in kinds])
    return state


@each_maximizer
@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("training", [False, True], ids=["found-eval", "found-train"])
def test_an_attack_leaves_the_model_as_it_was(maximizer: InnerMaximizer, train_mode: bool, training: bool) -> None:
    target = furnished()
    target.model.train(training)
    target.model.frozen.eval()
    before = state_of(target.model)
    attack(L2(1.0), maximizer, start=Uniform(0.1), train_mode=train_mode)(target, toy_batch(5))
    same(state_of(target.model), before)


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
def test_a_model_that_raises_is_left_as_it_was(train_mode: bool) -> None:
    target = furnished()
    calls: list[int] = []

    def fail_at_the_second(module: nn.Module, args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    target.model.head.register_forward_pre_hook(fail_at_the_second)
    before = state_of(target.model)
    with pytest.raises(ZeroDivisionError):
        attack(L2(1.0), PGD(3), start=Uniform(0.1), train_mode=train_mode)(target, toy_batch(5))
    same(state_of(target.model), before)


def test_a_graph_that_is_alive_survives_an_attack() -> None:
    target, batch = furnished(), toy_batch(5)
    loss = target.model.eval()(**batch)["loss"].mean()  # its backward needs the BatchNorms' statistics
    attack(L2(1.0), PGD(1))(target, batch)
    loss.backward()


def test_an_attack_runs_in_eval_mode_by_default() -> None:
    target = furnished()
    modes: list[tuple[bool, bool]] = []
    target.model.head.register_forward_pre_hook(
        lambda module, args: modes.append((target.model.norm.training, target.model.frozen.training))
    )
    attack(L2(1.0), PGD(1))(target, toy_batch(5))
    attack(L2(1.0), PGD(1), train_mode=True)(target, toy_batch(5))
    assert modes == [(False, False)] * 2 + [(True, False)] * 2


# --- law 9 and the generator ---


@pytest.mark.parametrize("start", [Uniform(0.3), Normal(0.3)], ids=repr)
def test_two_calls_of_an_attack_start_apart_and_two_attacks_of_a_seed_alike(start: Uniform | Normal) -> None:
    target, batch = toy(), toy_batch()
    one, two, other = (attack(L2(1.0), PGD(1), start=start, seed=seed) for seed in (4, 4, 5))
    first, second = one(target, batch), one(target, batch)
    assert not torch.equal(first.deltas["text"], second.deltas["text"])
    for expected in (first, second):
        got = two(target, batch)
        assert all(torch.equal(got.deltas[name], expected.deltas[name]) for name in got.deltas)
    assert not torch.equal(other(target, batch).deltas["text"], first.deltas["text"])


def test_an_attack_does_not_depend_on_torchs_own_random_state() -> None:
    target, batch = toy(), toy_batch()
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(attack(L2(1.0), PGD(2), start=Uniform(0.3))(target, batch))
    assert torch.equal(results[0].deltas["text"], results[1].deltas["text"])


def test_an_attack_shows_how_it_was_made() -> None:
    assert repr(attack(L2(1.0), PGD(2), seed=3)).endswith(
        "PGD(steps=2, modalities='together', keep='last', early_stop=False), seed=3)"
    )


def test_a_result_shows_shapes_losses_and_what_did_not_move() -> None:
    rows = torch.tensor([True, False, False])
    moved = {"text": torch.zeros(3, 5, 8), "image": torch.zeros(3, 4, 5)}
    assert repr(AttackResult(moved, None, None)) == "AttackResult(text (3, 5, 8), image (3, 4, 5))"
    result = AttackResult(
        moved,
        torch.tensor([1.0, 2.0, 3.0]),
        ~rows,
        nonfinite={"text": ~rows, "image": rows & ~rows},
        unmoved={"image": rows},
    )
    assert repr(result) == (
        "AttackResult(text (3, 5, 8), image (3, 4, 5), mean loss 2 of 3 rows, 2 of 3 still correct, "
        "1 of 3 unmoved in image, 2 of 3 nonfinite in text)"
    )
    assert repr(attack(L2(1.0), PGD(1))(toy(), toy_batch())).startswith(
        "AttackResult(text (3, 5, 8), image (3, 4, 5), mean"
    )


def test_owners_of_more_examples_than_there_are_are_refused() -> None:
    rows = torch.tensor([False, True, True])
    result = AttackResult({}, None, None, owners={"image": torch.tensor([5, 0, 2])})
    assert result.of_examples("image", rows, 3).tolist() == [True, False, True]
    with pytest.raises(DataError, match="expected rows of 'image' of 2 examples, got one of example 2"):
        result.of_examples("image", rows, 2)


def test_stopping_early_needs_a_judge() -> None:
    with pytest.raises(ConfigurationError, match="expected correct=… to stop early by"):
        Attack(EmbeddingPerturber(text=Ascent(L2(), step_size=0.1)), PGD(2, early_stop=True))(toy(), toy_batch())


def test_inference_mode_is_refused_with_the_way_out() -> None:
    attack = Attack(EmbeddingPerturber(image=Ascent(L2(0.5), step_size=0.1)), PGD(2))
    with torch.inference_mode(), pytest.raises(ConfigurationError, match=r"use torch\.no_grad"):
        attack(toy(), toy_batch())


@pytest.mark.parametrize("order", ["together", "in turn"])
def test_a_tensor_outside_its_box_is_refused_with_the_share_of_it(order: Any) -> None:
    batch = toy_batch(2)
    batch["regions"] = batch["regions"].clamp(0, 1) * torch.tensor(1 + 1e-16)
    batch["regions"][0, 0] = 1.5
    batch["regions"][1, -1] = -9.0  # padding
    bounded, free = Ascent(Linf(8 / 255), step_size=0.1, box=(0.0, 1.0)), Ascent(L2(1.0), step_size=0.1)
    found = Attack(EmbeddingPerturber(text=free, image=bounded), PGD(1, order))
    with pytest.raises(ConfigurationError, match=r"tensor of 'image' inside .*14\.29% .*PixelInput, or see Normalised"):
        found(toy(), batch)
    batch["regions"][0, 0] = 1.0
    found(toy(), batch)


def _takes_the_labels(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A call as many loops have it, which takes the labels out of the batch."""
    labels = batch.pop("labels")
    outputs: dict[str, Tensor] = model(**batch, labels=torch.zeros_like(labels))
    return outputs | {"loss": F.cross_entropy(outputs["logits"], labels, reduction="none")}


def test_a_call_and_a_loss_that_take_fields_out_of_the_batch_find_it_whole_in_every_pass() -> None:
    target, batch = toy(), toy_batch()
    taking = Adapter(target.model, toy_sites(), call=_takes_the_labels)
    perturber = EmbeddingPerturber(image=Ascent(L2(0.5), step_size=0.1))

    def loss(outputs: Any, fields: Any) -> Tensor:
        return F.cross_entropy(outputs["logits"], fields.pop("labels"), reduction="none")

    expected = Attack(perturber, PGD(3))(target, batch)
    for adapter, climbed in ((taking, None), (target, loss)):
        found = Attack(perturber, PGD(3), loss=climbed)(adapter, batch)
        assert torch.equal(found.deltas["image"], expected.deltas["image"])
        AdversarialTraining(perturber, FreeLB(3), SymmetricKL(1.0)).step(adapter, batch, loss=climbed)
    assert sorted(batch) == sorted(toy_batch())
