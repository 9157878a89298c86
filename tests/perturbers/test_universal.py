"""One perturbation for all samples: added at their real positions, moved by the sum of their gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.spawn import results
from support.toy import toy, toy_batch
from torch import Tensor

from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    AscentState,
    Attack,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Linf,
    Place,
    SymmetricKL,
    Uniform,
    Zero,
)
from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers import Momentum, UniversalPerturber


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()  # the last position is nobody's
PLACE = Place(randn(3, 5, 2), MASK)


def universal(**options: Any) -> UniversalPerturber:
    return UniversalPerturber(text=Ascent(L2(0.5), **{"step_size": 0.2, **options}))


def test_it_begins_with_one_row_for_all_at_positions_that_are_real_in_any_sample() -> None:
    delta = universal().begin("text", Uniform(0.3), PLACE, torch.Generator().manual_seed(0))
    assert delta.shape == (1, 5, 2)
    assert delta[:, :4].all()
    assert not delta[:, 4].any()
    assert delta.norm() <= 0.3
    assert not universal().begin("text", Zero(), PLACE, None).any()


def test_it_is_added_at_the_real_positions_of_every_sample_and_padding_stays_to_the_bit() -> None:
    delta, x = randn(1, 5, 2, seed=1), PLACE.x
    moved = universal().apply("text", PLACE, x, delta)
    assert torch.equal(moved[MASK], (x + delta)[MASK])
    assert torch.equal(moved[~MASK], x[~MASK])
    assert torch.equal(universal().apply("text", Place(x), x, delta), x + delta)


def test_it_is_added_in_the_wider_precision_and_cast_once() -> None:
    x, delta = randn(3, 5, 2, dtype=torch.bfloat16), randn(1, 5, 2, seed=1, dtype=torch.float32)
    moved = universal().apply("text", Place(x, MASK), x, delta)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved[MASK], (x.float() + delta).bfloat16()[MASK])


def test_its_gradient_is_the_sum_over_the_real_positions_of_all_samples() -> None:
    delta, weights = randn(1, 5, 2, seed=1).requires_grad_(), randn(3, 5, 2, seed=2)
    (universal().apply("text", PLACE, PLACE.x, delta) * weights).sum().backward()
    torch.testing.assert_close(delta.grad, (weights * MASK[..., None]).sum(0, keepdim=True), rtol=1e-12, atol=0.0)


def test_a_box_clips_the_tensor_of_every_sample_and_its_gradient() -> None:
    x, delta = (
        torch.rand(3, 5, 2, dtype=torch.float64),
        torch.full((1, 5, 2), 0.4, dtype=torch.float64, requires_grad=True),
    )
    moved = universal(box=(0.0, 1.0)).apply("text", Place(x), x, delta)
    assert torch.equal(moved, (x + delta).clamp(0, 1))
    moved.sum().backward()
    torch.testing.assert_close(delta.grad, (x + 0.4 < 1).double().sum(0, keepdim=True))
    assert universal(box=(0.0, 1.0)).box("text", torch.zeros(2, 3, 4)) == (0.0, 1.0)


@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 4, 2), (1, 5)], ids=str)
def test_a_perturbation_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"'text' of shape \(1, 5, 2\) for all samples, got"):
        universal().apply("text", PLACE, PLACE.x, torch.zeros(shape))


@pytest.mark.parametrize("rule", [None, "sign", Momentum()], ids=repr)
def test_it_moves_as_the_perturbation_of_one_sample_does(rule: object) -> None:
    options: dict[str, Any] = {"step_size": 0.2, "rule": rule}
    one = EmbeddingPerturber(text=Ascent(L2(0.5), **options))
    row = {"text": Place(PLACE.x[:1], MASK.any(0, keepdim=True))}
    deltas, others, memory, other_memory = {"text": torch.zeros(1, 5, 2).double()}, {}, {}, {}
    others = deltas
    for seed in range(4):
        gradients = {"text": randn(1, 5, 2, seed=seed)}
        deltas, memory = universal(**options).move(deltas, gradients, {"text": PLACE}, memory)
        others, other_memory = one.move(others, gradients, row, other_memory)
        assert torch.equal(deltas["text"], others["text"])
        assert not deltas["text"][:, 4].any()
    norms = universal(**options).norms(deltas, {"text": PLACE})["text"]
    torch.testing.assert_close(norms, deltas["text"].flatten(1).norm(dim=1))


def test_in_attacks_its_default_rule_is_the_one_of_attacks() -> None:
    attacker = UniversalPerturber(text=Ascent(Linf(0.5), step_size=0.2)).for_attack()
    moved = attacker.move({"text": torch.zeros(1, 5, 2).double()}, {"text": randn(1, 5, 2)}, {"text": PLACE}, {})
    assert (moved.deltas["text"][:, :4].abs() == 0.2).all()


def test_what_has_no_common_place_is_refused() -> None:
    packed = Place(PLACE.x[:, 0], segments=torch.tensor([0, 0, 1]))
    with pytest.raises(ShapeError, match=r"'text' to share a perturbation, got one of packed rows"):
        universal().begin("text", Zero(), packed, None)
    with pytest.raises(ConfigurationError, match="expected a ball of 'text' without relative"):
        UniversalPerturber(text=Ascent(L2(0.5, relative=True), step_size=0.1))
    with pytest.raises(ConfigurationError, match="expected at least one modality"):
        UniversalPerturber()


@pytest.mark.parametrize("regularizer", [None, SymmetricKL()], ids=repr)
def test_it_is_replayed_with_shared_dropout(regularizer: Any) -> None:
    """The pass that verifies the replay is under the perturbation as it is applied."""
    target = toy(dropout=0.4)
    method = AdversarialTraining(universal(), FreeLB(2), regularizer, dropout="shared")
    method.step(target, toy_batch())
    assert target.replay_verified


def test_in_half_precision_padding_is_no_part_of_what_survives() -> None:
    target, batch = toy(dtype=torch.bfloat16), toy_batch(dtype=torch.bfloat16)
    report = AdversarialTraining(universal(start=Uniform(0.5)), PGD(1)).step(target, batch)
    torch.testing.assert_close(report.effective["text"], torch.ones(3), rtol=0, atol=0.02)


def test_it_shows_how_it_was_made() -> None:
    assert repr(universal()).startswith("UniversalPerturber(text=Ascent(ball=L2(")


def worker(rank: int, folder: Path) -> dict[str, Any]:
    """Each process has one of two samples; what is real in one is padding in the other."""
    del folder
    mask = torch.tensor([[[True, True, False]], [[True, False, True]]])[rank]
    place, who = Place(torch.zeros(1, 3, 2).double(), mask), universal()
    start = who.begin("text", Uniform(0.3), place, torch.Generator().manual_seed(rank))
    gradient = torch.full((1, 3, 2), 1.0 + 2 * rank).double() * mask[..., None]
    moved = who.move({"text": start}, {"text": gradient}, {"text": place}, {}).deltas["text"]
    try:
        who.begin("text", Zero(), Place(torch.zeros(1, 3 + rank, 2)), None)
        refusal = ""
    except ConfigurationError as error:
        refusal = str(error)
    return {"start": start, "moved": moved, "refusal": refusal}


@pytest.mark.slow
def test_processes_share_one_start_and_one_step(tmp_path: Path) -> None:
    one, two = results("perturbers.test_universal:worker", 2, tmp_path)
    assert torch.equal(one["start"], two["start"])
    assert one["start"].all()
    mean = torch.tensor([2.0, 0.5, 1.5]).double()[None, :, None].expand(1, 3, 2)
    both = Place(torch.zeros(1, 3, 2).double())
    expected = Ascent(L2(0.5), step_size=0.2).step(one["start"], mean, both).delta
    for process in (one, two):
        torch.testing.assert_close(process["moved"], expected, rtol=1e-12, atol=0.0)
        assert "the length of 'text'" in process["refusal"]


def test_an_attack_finds_one_perturbation_for_its_batch() -> None:
    """Five sign steps from zero along the sum of the samples' gradients, by hand, in fp64."""
    target, batch = toy(), toy_batch()
    found = Attack(UniversalPerturber(text=Ascent(Linf(0.3), step_size=0.1, rule="sign")), PGD(5))(target, batch)
    delta = torch.zeros(1, 5, 8, dtype=torch.float64)
    for _ in range(5):
        delta.requires_grad_()
        loss = by_hand(delta, batch).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + 0.1 * gradient.sign()).clamp(-0.3, 0.3)
    assert found.deltas["text"].shape == (1, 5, 8)
    torch.testing.assert_close(found.deltas["text"], delta, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found.losses, by_hand(delta, batch).detach(), rtol=1e-12, atol=0.0)


def test_universal_adversarial_training_carries_one_perturbation_from_batch_to_batch() -> None:
    """Shafahi et al.: one pass a batch, whose gradient both updates the parameters and moves the perturbation."""
    method = AdversarialTraining(UniversalPerturber(text=Ascent(Linf(0.3), step_size=0.1, rule="sign")), FreeAT(1))
    target, state, delta = toy(), AscentState(), torch.zeros(1, 5, 8, dtype=torch.float64)
    for seed in range(3):
        batch = toy_batch(seed=seed)
        report = method.step(target, batch, state=state, update=target.model.zero_grad)
        delta.requires_grad_()
        loss = by_hand(delta, batch).mean()
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + 0.1 * gradient.sign()).clamp(-0.3, 0.3)
        torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-12, atol=0.0)
        torch.testing.assert_close(state.deltas["text"], delta, rtol=1e-12, atol=0.0)
    assert math.isclose(report.delta_norms["text"].item(), 0.3, rel_tol=1e-6)


def by_hand(delta: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The toy model's losses with this added at the real words of every sample."""
    model, real = toy().model, batch["mask"].unsqueeze(-1)
    hook = model.words.register_forward_hook(lambda module, args, output: torch.where(real, output + delta, output))
    try:
        return model(**batch)["loss"]
    finally:
        hook.remove()
