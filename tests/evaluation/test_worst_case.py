"""The worst case, on linear models whose exact robust accuracy is known, and against attacks that lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy import toy, toy_batch
from torch import Tensor, nn

import advvl
from advvl import L2, PGD, Adapter, Ball, Decay, Linf, Site
from advvl.errors import ConfigurationError, DataError, NonFiniteError, ShapeError, SiteError
from advvl.evaluation.measurement import Flag, Measurement
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.objectives import margin
from advvl.evaluation.robustness import robustness_curve
from advvl.evaluation.rows import take_rows
from advvl.evaluation.worst_case import Record, worst_case
from advvl.files import write_safetensors
from advvl.maximizers.auto_pgd import AutoPGD
from advvl.maximizers.base import AscentState, InnerMaximizer
from advvl.maximizers.minimum_norm import MinimumNorm
from advvl.maximizers.probes import Probe, Probes
from advvl.maximizers.random_search import RandomSearch
from advvl.perturbers.base import Perturber
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform

MARGIN = NamedAttack(name="margin", maximizer=PGD(8), objective=margin)
SHORT = [
    NamedAttack(name="short", maximizer=PGD(2), restarts=2, step_fraction=0.6),
    NamedAttack(name="random", maximizer=RandomSearch(3)),
]


class Linear(nn.Module):
    """Logits ±(⟨w, words⟩ + ⟨v, regions⟩), summed over positions; counts the rows that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.words, self.regions = nn.Identity(), nn.Identity()
        self.w = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(2, 5, generator=generator, dtype=torch.float64))
        self.rows = 0

    def forward(self, text: Tensor, image: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        self.rows += len(text)
        words = (self.words(text) * self.w).sum(-1).masked_fill(~mask, 0).sum(1)
        score = words + (self.regions(image) * self.v).sum((1, 2))
        return torch.stack([score, -score], 1)


def linear() -> Adapter:
    sites = {"text": Site("words", mask=lambda batch: batch["mask"]), "image": Site("regions")}
    return Adapter(Linear().eval(), sites)


def examples(target: Adapter, count: int = 40, *, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of two or three words, one in ten with the wrong label."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "text": torch.randn(count, 3, 4, generator=generator, dtype=torch.float64),
        "image": torch.randn(count, 2, 5, generator=generator, dtype=torch.float64),
        "mask": torch.arange(3) < (3 - torch.arange(count) % 2)[:, None],
    }
    with torch.no_grad():
        labels = target.model(**batch, targets=None).argmax(1)
    labels[::10] = 1 - labels[::10]
    return batch | {"targets": labels}


def reach(ball: Ball, weights: Tensor, real: Tensor) -> Tensor:
    """How far the score `(B,)` can be moved inside a ball, in closed form."""
    assert isinstance(ball, L2 | Linf)
    own = weights * real[..., None]
    dual = 2 if isinstance(ball, L2) else 1
    if ball.per == "token":
        return ball.radius * torch.linalg.vector_norm(own, dual, dim=-1).sum(1)
    return ball.radius * torch.linalg.vector_norm(own.flatten(1), dual, dim=1)


def exact(target: Adapter, batch: Mapping[str, Tensor], budget: Mapping[str, Ball]) -> Tensor:
    model = target.model
    with torch.no_grad():
        logits = model(**batch)
        right = logits.argmax(1) == batch["targets"]
        moved = torch.zeros(len(logits), dtype=torch.float64)
        for name, ball in budget.items():
            weights = model.w if name == "text" else model.v
            real = batch["mask"] if name == "text" else torch.ones(len(logits), 2, dtype=torch.bool)
            moved += reach(ball, weights, real)
        found: Tensor = (right & (logits[:, 0].abs() > moved)).double()
    return found


BUDGETS: dict[str, list[dict[str, Ball]]] = {
    "L2": [{"image": L2(0.3)}, {"image": L2(0.8)}],
    "Linf": [{"text": Linf(0.1)}, {"text": Linf(0.3)}],
    "L2 per token": [{"text": L2(0.2, per="token")}, {"text": L2(0.5, per="token")}],
    "jointly": [{"text": L2(0.3), "image": Linf(0.1)}, {"text": L2(0.6), "image": Linf(0.2)}],
    "each by itself": [{"text": L2(0.5)}, {"image": L2(0.5)}],
}


@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
def test_the_accuracy_of_a_linear_model_is_exactly_the_known_one_within_every_budget(
    budgets: list[dict[str, Ball]],
) -> None:
    target = linear()
    batch = examples(target)
    measured = worst_case(target, [batch], budgets, attacks=[MARGIN])
    expected = torch.stack([exact(target, batch, budget) for budget in budgets])
    torch.testing.assert_close(measured.worst(), expected, rtol=0, atol=0)
    assert 0 < expected.mean() < measured.clean.mean() == 0.9
    assert measured.flags == ()
    for r, budget in enumerate(budgets):
        for name, ball in budget.items():
            assert isinstance(ball, L2 | Linf)
            lengths = measured.norms[name][r, 0]
            broken = measured.scores[r, 0] == 0
            assert (lengths[broken] > 0.99 * ball.radius).all()
            assert not (lengths > ball.radius * (1 + 1e-10)).any()
        assert all(measured.norms[name][r].isnan().all() for name in measured.norms.keys() - budget.keys())


@pytest.mark.parametrize(
    "maximizer", [AutoPGD(10), MinimumNorm(10), RandomSearch(60)], ids=lambda one: type(one).__name__
)
def test_any_maximiser_is_an_attack_of_one_line(maximizer: InnerMaximizer) -> None:
    target = linear()
    batch = examples(target)
    attack = NamedAttack(name="one", maximizer=maximizer, objective=margin, step_fraction=2.0)
    budgets = [{"image": Linf(0.1)}, {"image": Linf(0.3)}]
    measured = worst_case(target, [batch], budgets, attacks=[attack], rows=take_rows)
    expected = torch.stack([exact(target, batch, budget) for budget in budgets])
    assert (measured.worst() >= expected).all()
    assert (measured.worst() - expected).sum() <= (2 if isinstance(maximizer, RandomSearch) else 0)


def test_steps_that_shrink_are_shares_of_each_radius() -> None:
    attack = NamedAttack(name="shrinking", maximizer=PGD(2), objective=margin, step_fraction=Decay(0.5, rate=0.5))
    assert attack.ascents({"image": L2(4.0)}, 0, {}, {})["image"].step_size == Decay(2.0, rate=0.5)
    target = linear()
    measured = worst_case(target, [examples(target)], [{"image": L2(0.1)}, {"image": L2(0.2)}], attacks=[attack])
    held = measured.scores[:, 0] > 0
    reached = measured.norms["image"][:, 0] / torch.tensor([[0.1], [0.2]])
    torch.testing.assert_close(reached[held], torch.full_like(reached[held], 0.75), rtol=1e-6, atol=0)


def test_modalities_in_turn_are_verified_together() -> None:
    target = linear()
    batch = examples(target)
    budget: dict[str, Ball] = {"text": L2(0.6), "image": L2(0.6)}
    attack = NamedAttack(name="in turn", maximizer=PGD(8, modalities="in turn"), objective=margin)
    measured = worst_case(target, [batch], budget, attacks=[attack])
    assert torch.equal(measured.worst()[0], exact(target, batch, budget))


class Wave(nn.Module):
    """Right where cos(x) is above 0: right again beyond the first region where it is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        wave = self.site(x).flatten(1).cos()
        return torch.cat([wave, torch.zeros_like(wave)], 1)


WAVE = {"x": torch.full((2, 1, 1), 0.1, dtype=torch.float64), "targets": torch.tensor([0, 0])}
STRIDE = NamedAttack(name="stride", maximizer=PGD(1), objective=margin, step_fraction=1.0)


def test_the_worst_point_on_the_way_counts_and_not_the_last_alone() -> None:
    target = Adapter(Wave().eval(), {"image": Site("site")})
    two = NamedAttack(name="two", maximizer=PGD(2), step_fraction=0.5)  # steps of π: wrong, then right
    measured = worst_case(target, [WAVE], {"image": L2(2 * math.pi)}, attacks=[two], checks=False)
    assert measured.scores.flatten().tolist() == [0.0, 0.0]
    torch.testing.assert_close(measured.norms["image"].flatten(), torch.full((2,), math.pi, dtype=torch.float64))


def test_a_smaller_budget_breaks_a_larger_one_and_rising_accuracy_is_flagged() -> None:
    target = Adapter(Wave().eval(), {"image": Site("site")})
    budgets = [{"image": L2(math.pi)}, {"image": L2(2 * math.pi)}]
    measured = worst_case(target, [WAVE], budgets, attacks=[STRIDE])
    assert measured.worst().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert measured.scores[:, 0].tolist() == [[0.0, 0.0], [1.0, 1.0]]  # its own curve rises
    assert "accuracy rising with radius" in {flag.name for flag in measured.flags}


class TwoFaced(Linear):
    """Answers otherwise as long as somebody looks at its gradients."""

    def forward(self, **batch: Tensor) -> Tensor:
        logits = super().forward(**batch)
        return -logits if torch.is_grad_enabled() else logits


def test_what_an_attack_saw_counts_for_nothing_until_a_fresh_forward_shows_it() -> None:
    honest = linear()
    batch = examples(honest)
    target = Adapter(TwoFaced().eval(), honest.sites)
    attack = NamedAttack(name="small", maximizer=PGD(3), objective=margin)
    measured = worst_case(target, [batch], {"image": L2(1e-6)}, attacks=[attack], checks=False)
    assert torch.equal(measured.worst()[0], measured.clean)
    assert measured.clean.mean() == 0.9


@dataclass(frozen=True)
class Claims(InnerMaximizer):
    """Runs one pass, does something, and claims a perturbation."""

    claim: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        feedback = yield Probe(perturber.starts())
        return self.claim(feedback.deltas)


def claims(claim: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> NamedAttack:
    return NamedAttack(name="liar", maximizer=Claims(claim), start=lambda restart, ball: Uniform(0.4))


OUTSIDE: dict[str, tuple[Any, str]] = {
    "ball": (lambda deltas: {m: 9 * d for m, d in deltas.items()}, r"by the attack 'liar' to be in L2\(radius=0\.5"),
    "NaN": (lambda deltas: {m: d * math.nan for m, d in deltas.items()}, "to be finite"),
    "modality": (lambda deltas: {}, r"expected perturbations of \['text'\] from the attack 'liar'"),
    "mask": (lambda deltas: {m: d + 1e-3 for m, d in deltas.items()}, "to be zero at masked positions"),
    "shape": (lambda deltas: {m: d[:, :1] for m, d in deltas.items()}, "expected a perturbation of 'text' of shape"),
}


@pytest.mark.parametrize(("claim", "words"), OUTSIDE.values(), ids=OUTSIDE)
def test_an_attack_that_leaves_its_ball_or_mask_is_refused_by_name(claim: Any, words: str) -> None:
    target = linear()
    with pytest.raises((ConfigurationError, ShapeError), match=words):
        worst_case(target, [examples(target)], {"text": L2(0.5)}, attacks=[claims(claim)])


def test_an_attack_that_leaves_its_box_is_refused_by_name() -> None:
    target = linear()
    batch = examples(target)
    batch["image"] = batch["image"].sigmoid()
    beyond = claims(lambda deltas: {m: d + 0.9 for m, d in deltas.items()})
    with pytest.raises(ConfigurationError, match=r"'image' by the attack 'liar' to be in the box \(0, 1\)"):
        worst_case(target, [batch], {"image": L2(9.0)}, attacks=[beyond], boxes={"image": (0, 1)})


def test_pixels_are_measured_as_pixels() -> None:
    target = linear()
    batch = examples(target)
    pixels = Normalised([0.5, 0.4], [0.25, 0.2], axis=1)
    batch["image"] = pixels.per_pixel(batch["image"].sigmoid() - torch.tensor([[[0.5], [0.4]]], dtype=torch.float64))
    given = {"boxes": {"image": (0.0, 1.0)}, "pixels": {"image": pixels}, "attacks": [MARGIN]}
    measured = worst_case(target, [batch], [{"image": Linf(0.05)}, {"image": Linf(0.1)}], **given)
    lengths = measured.norms["image"][1, 0]
    lengths = lengths[~lengths.isnan()]
    assert len(lengths)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1))


@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5)])
def test_pixels_that_their_dtype_rounds_out_of_the_box_are_attacked_all_the_same(ball: Ball) -> None:
    torch.manual_seed(0)
    target = Adapter(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).bfloat16().eval(), {"image": Site("0", at="input")})
    pixels = Normalised((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # CLIP's
    raw = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    x = pixels.per_pixel(raw - torch.tensor(pixels.mean).reshape(3, 1, 1)).bfloat16()
    batch = {"0": x, "targets": torch.tensor([0, 1])}
    assert not ((pixels.pixels(x) >= 0) & (pixels.pixels(x) <= 1)).all()
    target = Adapter(target.model, target.sites, call=lambda model, batch: model(batch["0"]))
    given: dict[str, Any] = {"boxes": {"image": (0.0, 1.0)}, "pixels": {"image": pixels}, "attacks": [MARGIN]}
    measured = worst_case(target, [batch], {"image": ball}, checks=False, **given)
    assert (measured.norms["image"].nan_to_num(0) <= ball.radius * (1 + 1e-5)).all()


def test_a_transfer_attack_is_made_on_another_model_and_verified_on_this_one() -> None:
    target, other = linear(), linear()
    batch = examples(target)
    with torch.no_grad():
        other.model.v.neg_()  # what hurts the other helps this one
    budget: dict[str, Ball] = {"image": L2(0.5)}
    for surrogate, expected in ((other, worst_case(target, [batch], {"image": L2(1e-9)}).clean), (linear(), None)):
        attack = NamedAttack(name="transfer", maximizer=PGD(8), objective=margin, surrogate=surrogate)
        measured = worst_case(target, [batch], budget, attacks=[attack], checks=False)
        found = exact(target, batch, budget) if expected is None else expected
        assert torch.equal(measured.worst()[0], found)


def test_lost_examples_are_run_no_more_with_rows_and_the_scores_are_the_same() -> None:
    target = linear()
    batch = examples(target)
    arguments: dict[str, Any] = {"budgets": [{"image": L2(0.3)}, {"image": L2(0.8)}], "checks": False}
    arguments["attacks"] = [NamedAttack(name="margin", maximizer=PGD(8), objective=margin, restarts=3)]
    target.model.rows = 0
    whole = worst_case(target, [batch], **arguments)
    all_rows, target.model.rows = target.model.rows, 0
    part = worst_case(target, [batch], rows=take_rows, **arguments)
    assert torch.equal(part.worst(), whole.worst())
    assert target.model.rows < all_rows
    assert part.scores[0, 0, ::10].isnan().all()  # wrong before any attack


class ZeroShot(nn.Module):
    """Images are scored against class prompts, which all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(6, 8, dtype=torch.float64)

    def forward(self, images: Tensor, prompts: Tensor) -> Tensor:
        return self.look(images) @ prompts.T


@pytest.mark.parametrize("checks", [True, False])
def test_rows_that_cut_what_belongs_to_all_examples_are_refused(checks: bool) -> None:
    """There are as many prompts as images: nothing but the number of answers shows that prompts were taken away."""
    model, batch = ZeroShot().eval(), {"images": torch.randn(4, 6).double(), "prompts": torch.randn(4, 8).double()}
    batch["targets"] = model(**batch).argmax(1)
    target = Adapter(model, {"image": Site("look", at="input")}, call=lambda net, b: net(b["images"], b["prompts"]))
    whole = partial(take_rows, whole=("prompts",))
    expected = worst_case(target, [batch], {"image": L2(2.0)}, checks=checks)
    found = worst_case(target, [batch], {"image": L2(2.0)}, checks=checks, rows=whole)
    assert torch.equal(found.worst(), expected.worst())
    with pytest.raises(DataError, match=r"expected answers \(4,\) .* got \(3,\); name the fields of all"):
        worst_case(target, [batch], {"image": L2(2.0)}, checks=checks, rows=take_rows)
    with pytest.raises(DataError, match=r"expected answers \(4,\) .* got \(3,\); name the fields of all"):
        robustness_curve(target, [batch], modality="image", radii=(2.0,), rows=take_rows)


def test_a_measurement_prints_its_accuracies_with_intervals_and_its_flags() -> None:
    scores = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]], dtype=torch.float64)
    norms = {"text": torch.zeros_like(scores)}
    flags = (Flag("random outputs", "Two differ."),)
    one = Measurement(
        ({"text": L2(0.5)},), ("PGD",), torch.ones(4).double(), scores, norms, torch.zeros(1, 1, 4) > 0, flags
    )
    assert repr(one).splitlines() == [
        "4 examples, 1 attacks; accuracy in per cent [95 % interval]",
        "clean: 100.0 [51.0, 100.0]",
        "text L2 0.5: 75.0 [30.1, 95.4]",
        "flag: random outputs. Two differ.",
    ]


def test_examples_are_the_same_in_one_batch_and_in_several() -> None:
    target = linear()
    batch = examples(target)
    parts = [take_rows(batch, rows) for rows in (torch.arange(7), torch.arange(7, 8), torch.arange(8, 40))]
    budgets = [{"text": L2(0.3)}, {"text": L2(0.8)}]
    whole, split = (worst_case(target, batches, budgets, attacks=[MARGIN]) for batches in ([batch], parts))
    assert torch.equal(whole.worst(), split.worst())
    assert torch.equal(whole.clean, split.clean)


def test_any_score_of_outputs_and_batch_is_attacked() -> None:
    target = linear()
    batch = examples(target)

    def confidence(outputs: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        return outputs.softmax(1).gather(1, rows["targets"][:, None]).squeeze(1)

    measured = worst_case(target, [batch], {"image": L2(0.5)}, attacks=[MARGIN], score=confidence)
    with torch.no_grad():
        logits = target.model(**batch)
        clean = confidence(logits, batch)
        signs = 1 - 2 * batch["targets"].double()
        least = torch.sigmoid(2 * (signs * logits[:, 0] - 0.5 * target.model.v.norm()))
    torch.testing.assert_close(measured.clean, clean)
    torch.testing.assert_close(measured.worst()[0], least)


def test_the_model_is_left_as_found() -> None:
    target = toy()
    batch = toy_batch(8)
    target.model.eval()
    target.model.norm = nn.BatchNorm1d(4, dtype=torch.float64).eval()
    target.model.head.weight.grad = torch.ones_like(target.model.head.weight)
    state = {name: value.clone() for name, value in target.model.state_dict().items()}
    random = torch.get_rng_state()
    worst_case(target, [batch], [{"text": L2(0.5)}, {"image": L2(0.5)}], targets=labels, attacks=SHORT)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(target.model.state_dict()), state, rtol=0, atol=0)
    assert {name for name, p in target.model.named_parameters() if p.grad is not None} == {"head.weight"}


def labels(batch: Mapping[str, Any]) -> Tensor:
    found: Tensor = batch["labels"]
    return found


def test_the_same_seed_gives_the_same_bits_and_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    target = toy()
    target.model.eval()
    budgets = [{"image": L2(0.5)}, {"image": L2(1.0)}, {"text": L2(0.5), "image": L2(0.5)}]
    first, again, other = (
        worst_case(target, [toy_batch(8)], budgets, targets=labels, attacks=SHORT, seed=seed, about={"model": "toy"})
        for seed in (0, 0, 1)
    )
    loaded = Measurement.load(first.save(tmp_path / "found.safetensors"))
    for same in (again, loaded):
        torch.testing.assert_close(same.scores, first.scores, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(dict(same.norms), dict(first.norms), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(other.norms["image"].nan_to_num(), first.norms["image"].nan_to_num())
    assert loaded.about["model"] == "toy"
    assert loaded.about["versions"] == {"advvl": advvl.__version__, "torch": torch.__version__}
    assert loaded.budgets == first.budgets


def test_a_cache_keeps_what_was_attacked_before() -> None:
    target = linear()
    batches = [examples(target, 6, seed=seed) for seed in range(3)]
    kept: dict[int, Record] = {}

    def cache(number: int, make: Callable[[], Record]) -> Record:
        if number not in kept:
            kept[number] = make()
        return kept[number]

    run = partial(worst_case, target, batches, {"image": L2(0.5)}, attacks=[MARGIN], cache=cache)
    first = run()
    target.model.rows = 0
    again = run()
    assert torch.equal(again.scores.nan_to_num(), first.scores.nan_to_num())
    assert target.model.rows == 0
    assert again.about["seconds"] == first.about["seconds"] > 0  # of the attacks, whichever call made them
    kept[0] = {name: one for name, one in kept[0].items() if name != "seconds"}
    with pytest.raises(DataError, match="the record of batch 0 from the cache"):
        run()


def test_a_cache_that_keeps_something_else_is_refused() -> None:
    target = linear()
    kept: dict[int, Record] = {}

    def cache(number: int, make: Callable[[], Record]) -> Record:
        return kept.setdefault(number, make()) if number not in kept else kept[number]

    run = partial(worst_case, target, attacks=[MARGIN], cache=cache)
    first, budgets = [examples(target, 6)], {"image": L2(0.5)}
    run(first, budgets)
    run(first, budgets)
    others: list[tuple[Any, Any, dict[str, Any]]] = [
        ([examples(target, 6, seed=1)], budgets, {}),
        ([take_rows(first[0], torch.arange(5))], budgets, {}),
        (first, [budgets, {"image": L2(1.0)}], {}),
        (first, budgets, {"attacks": SHORT}),
        (first, budgets, {"checks": False}),
        (first, budgets, {"cache": lambda number, make: None}),
    ]
    for loader, wanted, options in others:
        with pytest.raises(
            DataError, match="the record of batch 0 from the cache, got one of other examples or settings"
        ):
            run(loader, wanted, **options)


def test_an_empty_batch_among_others_changes_nothing() -> None:
    target = linear()
    batch = examples(target)
    found = [
        worst_case(target, loader, [{"text": L2(0.3)}, {"text": L2(0.5)}], attacks=SHORT, rows=take_rows)
        for loader in ([batch], [batch, take_rows(batch, torch.arange(0))])
    ]
    assert torch.equal(found[0].worst(), found[1].worst())


def leaves_gradients(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    outputs.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return outputs.sum(1)


def writes_parameters(target: Adapter) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    def loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        target.model.w.data.mul_(1.5)
        return outputs.sum(1)

    return loss


def test_an_attack_that_leaves_gradients_or_changes_parameters_is_refused() -> None:
    target = linear()
    batch = examples(target)
    for loss, what in ((leaves_gradients, r"\.grad of 'w'"), (writes_parameters(target), "parameter 'w'")):
        attack = NamedAttack(name="careless", maximizer=PGD(2), loss=loss, step_fraction=1.0)
        with pytest.raises(
            ConfigurationError, match=f"the attack 'careless' to leave the model as found, got a changed {what}"
        ):
            worst_case(target, [batch], {"text": L2(0.5)}, attacks=[attack])
        target.model.zero_grad()


def test_an_attack_that_changes_the_model_that_it_is_made_on_is_refused() -> None:
    target, other = linear(), linear()
    attack = NamedAttack(
        name="careless", maximizer=PGD(2), loss=writes_parameters(other), step_fraction=1.0, surrogate=other
    )
    with pytest.raises(ConfigurationError, match="the attack 'careless' to leave the model as found"):
        worst_case(target, [examples(target)], {"text": L2(0.5)}, attacks=[attack])


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "order": ({"budgets": [{"text": L2(1.0)}, {"text": L2(0.5)}]}, ConfigurationError, "from small to large"),
    "twice": ({"budgets": [{"text": L2(1.0)}, {"text": L2(1.0)}]}, ConfigurationError, "from small to large"),
    "zero": ({"budgets": {"text": L2(0.0)}}, ConfigurationError, "a finite radius above 0"),
    "unlimited": ({"budgets": {"text": L2()}}, ConfigurationError, "a finite radius above 0"),
    "number": ({"budgets": {"text": 0.5}}, ConfigurationError, "a finite radius above 0"),
    "none": ({"budgets": []}, ConfigurationError, "budgets as mappings from modality to ball"),
    "modality": ({"budgets": {"audio": L2(1.0)}}, SiteError, "'audio'"),
    "attacks": ({"attacks": []}, ConfigurationError, r"one NamedAttack\(…\) or more"),
    "one name": ({"attacks": [MARGIN, MARGIN]}, ConfigurationError, "attacks of different names"),
    "seed": ({"seed": -1}, ConfigurationError, "seed"),
    "draws": ({"draws": 0}, ConfigurationError, "draws"),
    "boxes": ({"boxes": (0, 1)}, ConfigurationError, "a mapping from modality to box"),
    "a box's modality": ({"boxes": {"imge": (0, 1)}}, SiteError, "'imge'"),
    "a box": ({"boxes": {"image": 1}}, ConfigurationError, "low < high"),
    "pixels": ({"pixels": 3}, ConfigurationError, "a mapping from modality to pixels"),
    "pixels' modality": ({"pixels": {"imge": Normalised([0.5], [0.5])}}, SiteError, "'imge'"),
    "a normalisation": ({"pixels": {"image": 3}}, ConfigurationError, r"a Normalised\(mean, std\)"),
    "relative to the batch": ({"budgets": {"text": L2(0.5, relative="batch")}}, ConfigurationError, "relative='row'"),
    "about a tensor": ({"about": {"x": torch.ones(1)}}, ConfigurationError, "about as plain JSON"),
    "about NaN": ({"about": {"x": math.nan}}, ConfigurationError, "about as plain JSON"),
    "about a list": ({"about": [1]}, ConfigurationError, "about as a mapping"),
    "checks": ({"checks": "no"}, ConfigurationError, "checks to be True or False"),
    "score": ({"score": lambda outputs, batch: outputs}, ShapeError, "one number per example"),
    "scale": ({"score": lambda outputs, batch: 2 + outputs[:, 0]}, DataError, r"scores in \[0, 1\]"),
    "rows": ({"rows": lambda batch, rows: batch}, DataError, "the 36 rows asked for, got 40"),
    "rows in another order": (
        {"rows": lambda batch, rows: take_rows(batch, rows.flip(0))},
        DataError,
        "in that order, got others' targets",
    ),
    "loss": ({"attacks": [NamedAttack(name="a", maximizer=PGD(2), objective=None)]}, ConfigurationError, "with a loss"),
    "scalar": (
        {"attacks": [NamedAttack(name="a", maximizer=PGD(2), loss=lambda outputs, batch: outputs.sum())]},
        ShapeError,
        r"loss as one per row",
    ),
    "a batch": ({"loader": {"x": torch.zeros(1)}}, DataError, r"pass \[batch\]"),
    "no batch": ({"loader": []}, DataError, "one example or more"),
    "tuples": ({"loader": [(1, 2)]}, DataError, "batches as mappings"),
}


@pytest.mark.parametrize(("wrong", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_make_no_sense_are_refused(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    target = linear()
    given: dict[str, Any] = {"loader": [examples(target)], "budgets": {"text": L2(0.5)}, "attacks": [MARGIN], **wrong}
    with pytest.raises(error, match=words):
        worst_case(target, given.pop("loader"), given.pop("budgets"), **given)


@pytest.mark.parametrize("wrong", [{"boxes": {"imge": (0, 1)}}, {"pixels": {"image": 3}}, {"about": {"x": {1}}}])
def test_what_would_fail_late_is_refused_before_the_model_runs(wrong: dict[str, Any]) -> None:
    target = linear()
    batch, before = examples(target), target.model.rows
    with pytest.raises((ConfigurationError, SiteError)):
        worst_case(target, [batch], {"text": L2(0.5)}, **wrong)
    assert target.model.rows == before


def test_a_measurement_says_its_boxes_and_pixels() -> None:
    target = linear()
    options: Any = {"boxes": {"image": (-9, 9)}, "pixels": {"image": Normalised([0.5] * 2, [0.5] * 2, axis=1)}}
    found = worst_case(target, [examples(target)], {"image": L2(0.1)}, attacks=[MARGIN], **options)
    assert found.about["boxes"] == {"image": [-9, 9]}
    assert "0.5" in found.about["pixels"]["image"]


def test_a_fingerprint_is_that_of_the_examples_alone() -> None:
    target = linear()
    batch = examples(target)
    run = partial(worst_case, target, budgets={"text": L2(0.1)}, attacks=[MARGIN], checks=False)
    whole = run([batch]).about["data_fingerprint"]
    assert (
        run([take_rows(batch, torch.arange(7)), take_rows(batch, torch.arange(7, 40))]).about["data_fingerprint"]
        == whole
    )
    assert run([batch | {"image": batch["image"] + 1e-9}]).about["data_fingerprint"] != whole
    assert run([take_rows(batch, torch.arange(40).flip(0))]).about["data_fingerprint"] != whole


@pytest.mark.parametrize(
    "said",
    [
        *("{}", "[]", '{"budgets": [{"text": {}}]}', '{"budgets": 1}', '{"budgets": [["text"]]}'),
        *("{", '{"about": 1, "about": 2}', "[" * 100_000),
    ],
    ids=lambda said: said[:30],
)
def test_a_measurement_of_other_entries_is_refused(said: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"clean": torch.ones(1)}, metadata={"advvl_measurement": said})
    with pytest.raises(DataError, match=r"a whole measurement in .*x\.safetensors"):
        Measurement.load(tmp_path / "x.safetensors")


ODD: dict[str, tuple[Callable[[Measurement], dict[str, Any]], str]] = {
    "scores of other examples": (
        lambda m: {"scores": m.scores[..., :5]},
        r"scores \(2, 2, 40\), got float64 \(2, 2, 5\)",
    ),
    "scores at other budgets": (lambda m: {"scores": m.scores[:1]}, "scores"),
    "scores above 1": (lambda m: {"scores": 2 * m.scores}, r"scores in \[0, 1\], got 0 to 2"),
    "clean scores that are none": (lambda m: {"clean": m.clean * math.nan}, r"clean in \[0, 1\]"),
    "rows of other examples": (lambda m: {"unmoved": m.unmoved[..., :5]}, "unmoved"),
    "rows in numbers": (lambda m: {"unmoved": m.unmoved.double()}, "unmoved"),
    "norms of other examples": (lambda m: {"norms": {"image": m.norms["image"][0]}}, "norms of 'image'"),
    "no norms": (lambda m: {"norms": {}}, r"none of \['image'\]"),
    "no budget": (
        lambda m: {"budgets": (), "scores": m.scores[:0], "unmoved": m.unmoved[:0], "norms": {}},
        "no budget",
    ),
    "one attack twice": (lambda m: {"attacks": ("a", "a")}, "different names of attacks"),
    "a flag without words": (lambda m: {"flags": (Flag("a", 1),)}, "flags in words"),  # type: ignore[arg-type]
    "about a list": (lambda m: {"about": [1]}, "about as a mapping"),
}


@pytest.mark.parametrize(("change", "words"), ODD.values(), ids=ODD)
def test_parts_that_do_not_fit_each_other_are_no_measurement(
    change: Callable[[Measurement], dict[str, Any]], words: str, tmp_path: Path
) -> None:
    target = linear()
    found = worst_case(
        target, [examples(target)], [{"image": L2(0.3)}, {"image": L2(0.8)}], attacks=SHORT, checks=False
    )
    with pytest.raises(DataError, match=f"expected a measurement with .*{words}"):
        replace(found, **change(found))


def test_a_negative_radius_is_refused_by_the_ball() -> None:
    with pytest.raises(ConfigurationError, match="radius of 0 or more"):
        L2(-0.5)


def test_a_model_in_training_mode_is_refused_also_one_that_attacks_come_from() -> None:
    training, target = linear(), linear()
    training.model.words.train()
    batch = examples(target)
    with pytest.raises(
        ConfigurationError, match=r"eval mode, got 1 modules in training mode, 'words' first; call model\.eval"
    ):
        worst_case(training, [batch], {"text": L2(0.5)})
    with pytest.raises(ConfigurationError, match="eval mode"):
        worst_case(
            target,
            [batch],
            {"text": L2(0.5)},
            attacks=[NamedAttack(name="transfer", maximizer=PGD(8), surrogate=training)],
        )


def test_logits_that_are_not_a_number_judge_nothing() -> None:
    target = linear()
    batch = examples(target)
    with torch.no_grad():
        target.model.w[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="not a number"):
        worst_case(target, [batch], {"text": L2(0.5)})


@pytest.mark.parametrize(
    "wrong",
    [{"name": ""}, {"maximizer": "PGD"}, {"restarts": 0}, {"step_fraction": 0.0}, {"objective": 1}, {"surrogate": 1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_attacks_of_parts_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected .*, got"):
        NamedAttack(**{"name": "a", "maximizer": PGD(2)} | wrong)
