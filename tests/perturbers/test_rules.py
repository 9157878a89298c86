"""Rules with a state step as published, and keep the laws of those without: masks, broken rows, padding, order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from advvl import L2, Ascent, Ball, EmbeddingPerturber, Linf, Place
from advvl.errors import ConfigurationError
from advvl.perturbers import Adam, Decay, Momentum, StatefulRule
from advvl.perturbers.ascents import StepMemory

RULES = [Momentum(0.9), Momentum(0.9, of="sign"), Adam(), Adam((0.5, 0.9), eps=0.0)]
BALLS = [L2(0.5), Linf(0.3), L2(0.3, per="token"), Linf(0.3, per="token")]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
each_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: f"{type(ball).__name__}-{ball.per}")
exact = {"rtol": 1e-12, "atol": 1e-15}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def climb(ascent: Ascent, place: Place, gradients: list[Tensor]) -> tuple[list[Tensor], StepMemory]:
    """The perturbation after each of these gradients, and what the ascent keeps at the end."""
    delta, memory, deltas = torch.zeros_like(place.x), StepMemory(), []
    for gradient in gradients:
        delta, memory = ascent.step(delta, gradient, place, memory)
        deltas.append(delta)
    return deltas, memory


def kept(memory: StepMemory) -> list[Tensor]:
    return [memory.state] if isinstance(memory.state, Tensor) else list(memory.state)


GRADIENTS = [randn(3, 4, 5, seed=seed) * 10.0 ** (seed - 2) for seed in range(5)]
WHOLE = Place(torch.zeros(3, 4, 5, dtype=torch.float64))
MASKED = Place(WHOLE.x, mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool())


# --- as published ---


def test_momentum_under_linf_is_mi_fgsm() -> None:
    delta, velocity = torch.zeros(3, 4, 5, dtype=torch.float64), torch.zeros(3, 4, 5, dtype=torch.float64)
    deltas, _ = climb(Ascent(Linf(0.25), step_size=0.1, rule=Momentum(1.0)), WHOLE, GRADIENTS)
    for g, ours in zip(GRADIENTS, deltas, strict=True):
        velocity = 1.0 * velocity + g / g.abs().sum((1, 2), keepdim=True)
        delta = (delta + 0.1 * velocity.sign()).clamp(-0.25, 0.25)
        torch.testing.assert_close(ours, delta, **exact)


def test_momentum_under_l2_steps_along_the_velocity_normalised() -> None:
    delta, velocity = torch.zeros(3, 4, 5, dtype=torch.float64), torch.zeros(3, 4, 5, dtype=torch.float64)
    deltas, _ = climb(Ascent(L2(0.25), step_size=0.1, rule=Momentum(0.9)), WHOLE, GRADIENTS)
    for g, ours in zip(GRADIENTS, deltas, strict=True):
        velocity = 0.9 * velocity + g / g.abs().sum((1, 2), keepdim=True)
        delta = delta + 0.1 * velocity / velocity.flatten(1).norm(dim=1)[:, None, None]
        delta = delta * (0.25 / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
        torch.testing.assert_close(ours, delta, **exact)


def test_momentum_of_signs_is_robust_clips() -> None:
    """Its pgd_train.py, gradients of exactly zero among the others."""
    gradients = [g * (randn(3, 4, 5, seed=9 + i) > 0) for i, g in enumerate(GRADIENTS)]
    delta, velocity = torch.zeros(3, 4, 5, dtype=torch.float64), torch.zeros(3, 4, 5, dtype=torch.float64)
    deltas, _ = climb(Ascent(Linf(0.25), step_size=0.1, rule=Momentum(0.9, of="sign")), WHOLE, gradients)
    for g, ours in zip(gradients, deltas, strict=True):
        velocity = (0.9 * velocity + g.sign()).sign()
        delta = (delta + 0.1 * velocity).clamp(-0.25, 0.25)
        torch.testing.assert_close(ours, delta, **exact)


@pytest.mark.parametrize("eps", [1e-8, 1e-2], ids=str)
@pytest.mark.parametrize("radius", [math.inf, 0.15], ids=["no-ball", "ball"])
def test_adam_is_torchs_with_the_projection_after_it(radius: float, eps: float) -> None:
    parameter = torch.zeros(3, 4, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.8, 0.99), eps=eps, maximize=True)
    ascent = Ascent(L2(radius, per="token"), step_size=0.1, rule=Adam((0.8, 0.99), eps=eps))
    deltas, _ = climb(ascent, WHOLE, GRADIENTS)
    for g, ours in zip(GRADIENTS, deltas, strict=True):
        parameter.grad = g.clone()
        optimizer.step()
        with torch.no_grad():
            parameter /= (parameter.norm(dim=-1, keepdim=True) / radius).clamp(min=1)
        torch.testing.assert_close(ours, parameter.detach(), **exact)


# --- the laws ---


@each_rule
@each_ball
def test_the_first_zero_gradient_gives_no_step(rule: StatefulRule, ball: Ball) -> None:
    deltas, _ = climb(Ascent(ball, step_size=0.1, rule=rule), MASKED, [torch.zeros_like(WHOLE.x)] * 2)
    assert not deltas[-1].any()


@each_rule
@each_ball
@pytest.mark.parametrize("at_masked", [1.0, math.nan], ids=str)
def test_masked_positions_are_zero_in_perturbation_and_memory(rule: StatefulRule, ball: Ball, at_masked: float) -> None:
    beyond = ~MASKED.mask
    gradients = [g.masked_fill(beyond[..., None], at_masked) for g in GRADIENTS]
    clean = [g.masked_fill(beyond[..., None], 0.0) for g in GRADIENTS]
    ascent = Ascent(ball, step_size=0.1, rule=rule)
    deltas, memory = climb(ascent, MASKED, gradients)
    expected, _ = climb(ascent, MASKED, clean)
    for ours, theirs in zip(deltas, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours[beyond].any()
        assert ours[~beyond].any()
    for state in kept(memory):
        assert state.shape != WHOLE.x.shape or not state[beyond].any()


@pytest.mark.slow
@each_rule
@each_ball
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("when", [0, 2])
def test_a_row_whose_gradient_is_not_finite_keeps_its_perturbation_and_its_memory(
    rule: StatefulRule, ball: Ball, bad: float, when: int
) -> None:
    """It goes on as if that step had not been taken; the other rows do not notice."""
    broken = [g.clone() for g in GRADIENTS]
    broken[when][1, 2, 3] = bad
    ascent = Ascent(ball, step_size=0.1, rule=rule)
    deltas, _ = climb(ascent, WHOLE, broken)
    whole, _ = climb(ascent, WHOLE, GRADIENTS)
    without, _ = climb(ascent, WHOLE, GRADIENTS[:when] + GRADIENTS[when + 1 :])
    row = torch.zeros(3, 4, dtype=torch.bool)
    row[1, 2 if ball.per == "token" else slice(None)] = True
    before = deltas[when - 1] if when else torch.zeros_like(WHOLE.x)
    assert torch.equal(deltas[when][row], before[row])
    torch.testing.assert_close(deltas[-1][row], without[-1][row], **exact)
    assert torch.equal(deltas[-1][~row], whole[-1][~row])


@each_rule
@each_ball
def test_neither_padding_nor_the_order_of_samples_matters(rule: StatefulRule, ball: Ball) -> None:
    order, longer = torch.tensor([2, 0, 1]), torch.zeros(3, 3, 5, dtype=torch.float64)
    ascent = Ascent(ball, step_size=0.1, rule=rule)
    deltas, _ = climb(ascent, MASKED, GRADIENTS)
    mask = torch.cat([MASKED.mask, torch.zeros(3, 3, dtype=torch.bool)], 1)
    padded = Place(torch.cat([MASKED.x, longer], 1)[order], mask[order])
    others, _ = climb(ascent, padded, [torch.cat([g, longer + 7], 1)[order] for g in GRADIENTS])
    torch.testing.assert_close(others[-1][:, :4], deltas[-1][order], **exact)


@each_rule
@each_ball
def test_packed_rows_step_with_their_sample(rule: StatefulRule, ball: Ball) -> None:
    """Sample 0 has rows 0 and 2 of the packed tensor, sample 1 row 1."""
    ascent, where = Ascent(ball, step_size=0.1, rule=rule), torch.tensor([0, 2])
    gradients = [g[:, 0] for g in GRADIENTS]
    packed, _ = climb(
        ascent, Place(torch.zeros(3, 5, dtype=torch.float64), segments=torch.tensor([0, 1, 0])), gradients
    )
    padded, _ = climb(ascent, Place(torch.zeros(1, 2, 5, dtype=torch.float64)), [g[where][None] for g in gradients])
    torch.testing.assert_close(packed[-1][where], padded[-1][0], **exact)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30], ids=str)
@pytest.mark.parametrize("rule", [Momentum(), Momentum(of="sign"), Adam(eps=0.0)], ids=repr)
@each_ball
def test_a_gradient_of_any_size_steps_as_far_as_any_other(rule: StatefulRule, ball: Ball, scale: float) -> None:
    place = Place(WHOLE.x.float())
    ascent = Ascent(ball, step_size=0.1, rule=rule)
    plain, _ = climb(ascent, place, [g.float() for g in GRADIENTS])
    scaled, _ = climb(ascent, place, [(g * scale).float() for g in GRADIENTS])
    torch.testing.assert_close(scaled[-1], plain[-1], rtol=1e-4, atol=1e-6)


@each_rule
@each_ball
def test_a_perturber_holds_no_state(rule: StatefulRule, ball: Ball) -> None:
    ascent = Ascent(ball, step_size=0.1, rule=rule)
    first, _ = climb(ascent, WHOLE, GRADIENTS)
    second, _ = climb(ascent, WHOLE, GRADIENTS)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_each_modality_has_a_memory_of_its_own_and_those_that_do_not_move_keep_it() -> None:
    who = EmbeddingPerturber(
        text=Ascent(L2(), step_size=0.1, rule=Momentum()), image=Ascent(L2(), step_size=0.1, rule=Adam())
    )
    places = {"text": WHOLE, "image": WHOLE}
    deltas = dict.fromkeys(places, WHOLE.x)
    both = who.move(deltas, dict.fromkeys(places, GRADIENTS[0]), places, {})
    one = who.move(both.deltas, {"text": GRADIENTS[1]}, places, both.memory)
    assert set(one.deltas) == {"text"}
    assert one.memory["image"] is both.memory["image"]
    assert (one.memory["text"].steps, both.memory["text"].steps) == (2, 1)


# --- the rule that None stands for ---


@pytest.mark.parametrize(("ball", "attacks"), [(Linf(1.0), "sign"), (L2(1.0), "normalised")], ids=["Linf", "L2"])
def test_no_rule_is_the_sign_in_attacks_under_linf_and_normalised_elsewhere(ball: Ball, attacks: str) -> None:
    ascent = Ascent(ball, step_size=0.1)
    perturber = EmbeddingPerturber(text=ascent)

    def moved(one: Ascent | EmbeddingPerturber) -> Tensor:
        if isinstance(one, Ascent):
            return one.step(WHOLE.x, GRADIENTS[2], WHOLE).delta
        return one.move({"text": WHOLE.x}, {"text": GRADIENTS[2]}, {"text": WHOLE}, {}).deltas["text"]

    assert torch.equal(moved(perturber), moved(replace(ascent, rule="normalised")))
    assert torch.equal(moved(perturber.for_attack()), moved(replace(ascent, rule=attacks)))


@pytest.mark.parametrize("rule", ["normalised", "sign", Momentum(), Adam()], ids=repr)
def test_a_rule_that_is_given_stays_in_attacks(rule: object) -> None:
    perturber = EmbeddingPerturber(text=Ascent(Linf(1.0), step_size=0.1, rule=rule))
    assert perturber.for_attack().ascents == perturber.ascents


# --- step sizes that change ---


@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [
        (Decay(0.4, rate=0.5), [0.4, 0.2, 0.1]),
        (lambda step: 0.1 * (step + 1), [0.1, 0.2, 0.3]),
        (lambda step: 0, [0, 0, 0]),
    ],
    ids=["decay", "function", "zero"],
)
def test_a_step_size_may_follow_the_number_of_the_step(schedule: Callable[[int], float], sizes: list[float]) -> None:
    deltas, _ = climb(Ascent(L2(), step_size=schedule), WHOLE, [GRADIENTS[0]] * 3)
    lengths = [L2().norms(after - before, WHOLE) for before, after in zip([WHOLE.x, *deltas], deltas, strict=False)]
    for length, size in zip(lengths, sizes, strict=True):
        torch.testing.assert_close(length, torch.full((3,), float(size), dtype=torch.float64), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("size", [-0.1, math.nan, math.inf, None, "0.1", torch.tensor(0.1)], ids=repr)
def test_a_schedule_gives_numbers_of_0_or_more(size: object) -> None:
    with pytest.raises(ConfigurationError, match="expected a finite step size of 0 or more for step 0, got"):
        climb(Ascent(L2(), step_size=lambda step: size), WHOLE, GRADIENTS)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("expected a finite decay of 0 or more, got -0.1", lambda: Momentum(-0.1)),
        ("expected a finite decay of 0 or more, got nan", lambda: Momentum(math.nan)),
        ("expected of to be 'gradient' or 'sign', got 'l1'", lambda: Momentum(of="l1")),
        (r"expected two betas in \[0, 1\), got \(0.9, 1.0\)", lambda: Adam((0.9, 1.0))),
        (r"expected two betas in \[0, 1\), got 0.9", lambda: Adam(0.9)),
        ("expected a finite eps of 0 or more, got -1", lambda: Adam(eps=-1)),
        ("expected a finite first above 0, got 0", lambda: Decay(0, rate=0.5)),
        ("expected a finite rate above 0, got inf", lambda: Decay(0.1, rate=math.inf)),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
