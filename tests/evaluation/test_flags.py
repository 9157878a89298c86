"""Flags, each seen on a planted fake, and none on honest models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.toy import ToyModel, toy_batch, toy_sites
from torch import Tensor, nn

from advvl import L2, PGD, Adapter, Linf, Site
from advvl.evaluation.flags import raised
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.objectives import margin
from advvl.evaluation.replacements import differ
from advvl.evaluation.worst_case import worst_case
from advvl.maximizers.base import AscentState, InnerMaximizer
from advvl.maximizers.probes import Probes
from advvl.maximizers.random_search import RandomSearch
from advvl.perturbers.base import Perturber

BUDGETS = [{"image": L2(0.5)}, {"image": L2(2.0)}]
ATTACKS = (
    NamedAttack(name="cross-entropy", maximizer=PGD(10)),
    NamedAttack(name="margin", maximizer=PGD(10), objective=margin),
    NamedAttack(name="random search", maximizer=RandomSearch(40), objective=margin, step_fraction=2.0),
)


class Filtered(nn.Module):
    """A toy model with something before its layer of regions, and its logits multiplied."""

    def __init__(self, before: Callable[[Tensor], Tensor], scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.scale = ToyModel(), scale
        self.inner.project = _Before(before, self.inner.project)

    def forward(self, **batch: Tensor) -> Tensor:
        logits: Tensor = self.inner(**batch)["logits"]
        return self.scale * logits


class _Before(nn.Module):
    def __init__(self, before: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer = before, layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(self.before(x))
        return found


def target(before: Callable[[Tensor], Tensor] = lambda x: x, scale: float = 1.0) -> Adapter:
    sites = {name: Site(f"inner.{site.module}", at=site.at, mask=site.mask) for name, site in toy_sites().items()}
    return Adapter(Filtered(before, scale).float().eval(), sites)


def labelled(adapter: Adapter, count: int = 30) -> dict[str, Tensor]:
    batch = toy_batch(count, dtype=torch.float32)
    with torch.no_grad():
        return batch | {"labels": adapter.model(**batch).argmax(1)}


def labels(batch: Mapping[str, Any]) -> Tensor:
    found: Tensor = batch["labels"]
    return found


def measured(adapter: Adapter, budgets: list[dict[str, L2]] = BUDGETS, **options: Any) -> Measurement:
    given = {"attacks": ATTACKS, "targets": labels} | options
    return worst_case(adapter, [labelled(adapter)], budgets, **given)


def names(found: Measurement) -> set[str]:
    return {flag.name for flag in found.flags}


EVERYWHERE = [{"text": L2(0.5)}, {"text": L2(1.0)}, {"image": L2(1.0)}, {"text": L2(0.5), "image": L2(0.5)}]

HONEST: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "ignores the image by a weight of 0": lambda x: 0 * x,
    "ignores the image and has no gradient": torch.zeros_like,
    "linear and small": lambda x: x / 100,
}


@pytest.mark.parametrize("before", HONEST.values(), ids=HONEST)
@pytest.mark.slow
def test_an_honest_model_raises_no_flag_within_budgets_of_all_kinds(before: Callable[[Tensor], Tensor]) -> None:
    found = measured(target(before), EVERYWHERE)
    assert found.flags == ()
    assert found.worst().mean() < 1


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


FAKES: dict[str, tuple[Adapter, set[str]]] = {
    "logits of a million": (target(scale=1e6), {"vanishing gradients", "loss not rising with radius"}),
    "a quantiser": (
        target(lambda x: (4 * x).round() / 4),
        {"vanishing gradients", "unmoved examples", "loss not rising with radius", "random search beats gradients"},
    ),
    "a quantiser outside the graph": (
        target(lambda x: (4 * x.detach()).round() / 4),
        {"vanishing gradients", "unmoved examples", "unlimited attack fails"},
    ),
    "random input": (target(lambda x: x + 0.5 * torch.randn_like(x)), {"random outputs"}),
    "statistics of the batch": (target(lambda x: x - x.mean(dim=0)), {"coupled examples"}),
    "NaN gradients": (target(_NoGradient.apply), {"gradients not finite", "vanishing gradients", "unmoved examples"}),
}


@pytest.mark.parametrize(("adapter", "expected"), FAKES.values(), ids=FAKES)
def test_a_fake_defence_is_flagged(adapter: Adapter, expected: set[str]) -> None:
    found = measured(adapter)
    assert names(found) >= expected
    assert all(flag.detail.endswith(".") and any(c.isdigit() for c in flag.detail) for flag in found.flags)


def test_a_search_for_which_no_example_was_left_is_said_to_have_had_none() -> None:
    search = NamedAttack(name="search", maximizer=RandomSearch(5), objective=margin)
    lost = measured(target(lambda x: x), attacks=(*ATTACKS[:1], search), budgets=[{"text": L2(1e3), "image": L2(1e3)}])
    assert not lost.worst().any()
    assert lost.about["checks"]["random search beats gradients"] == "not made: no example was left for search"


class _OwnSearch(InnerMaximizer):
    """A random search of somebody else's, around another one."""

    gradients = False

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        return RandomSearch(40).probes(perturber, generator=generator, state=state)


def test_a_search_of_the_users_own_is_made_after_the_gradients_and_beats_them() -> None:
    own = NamedAttack(name="own", maximizer=_OwnSearch(), objective=margin, step_fraction=2.0)
    found = measured(target(lambda x: (4 * x).round() / 4), attacks=(own, *ATTACKS[:2]))
    assert found.about["checks"]["random search beats gradients"] == "made"
    assert "random search beats gradients" in names(found)


def test_a_mean_over_draws_is_scored_where_a_model_draws() -> None:
    adapter = target(lambda x: x + 0.5 * torch.randn_like(x))
    one, many = (measured(adapter, BUDGETS[:1], attacks=ATTACKS[:1], draws=draws) for draws in (1, 8))
    assert set(one.clean.tolist()) <= {0.0, 1.0}
    assert len(set(many.clean.tolist())) > 2
    assert "random outputs" in names(one) & names(many)


def test_gradients_that_point_away_are_beaten_by_a_transfer_attack() -> None:
    honest = target()

    fake = target(_Away.apply)
    transfer = NamedAttack(name="transfer", maximizer=PGD(10), objective=margin, surrogate=honest)
    found = measured(fake, attacks=(*ATTACKS[:2], transfer))
    assert names(found) >= {"transfer attack beats gradients", "loss not rising with radius", "unlimited attack fails"}
    assert "transfer attack beats gradients" not in names(measured(honest, attacks=(*ATTACKS[:2], transfer)))


class _Masked(nn.Module):
    """A model with one more answer, which is masked."""

    def __init__(self, inner: nn.Module, at: float) -> None:
        super().__init__()
        self.inner, self.at = inner, at

    def forward(self, **batch: Tensor) -> Tensor:
        logits: Tensor = self.inner(**batch)
        return torch.cat([logits, logits.new_full((len(logits), 1), self.at)], dim=1)


@pytest.mark.parametrize("at", [-1e9, -math.inf])
@pytest.mark.parametrize("fake", ["a quantiser", "random input"])
def test_a_masked_answer_hides_no_flag(fake: str, at: float) -> None:
    adapter, expected = FAKES[fake]
    sites = {name: Site(f"inner.inner.{site.module}", at=site.at, mask=site.mask) for name, site in toy_sites().items()}
    masked = Adapter(_Masked(adapter.model, at).eval(), sites)
    assert names(measured(masked)) >= expected


def test_answers_differ_by_more_than_rounding() -> None:
    row = torch.tensor([3.0, 1.0, 1e-9, -2.0])
    changed = {False: [0.0, 1e-4, 1e-4, -1e-4], True: [0.01, 0.0, 0.0, 0.0]}
    for tail in (torch.zeros(0), torch.tensor([-1e9]), torch.tensor([-math.inf])):
        for expected, change in changed.items():
            one, other = torch.cat([row, tail]), torch.cat([row + torch.tensor(change), tail * (1 + 1e-7)])
            assert differ(one[None], other[None]).tolist() == [expected]
    assert differ(torch.zeros(1, 3), torch.zeros(1, 3)).tolist() == [False]
    assert differ(torch.tensor([[1.0, -math.inf]]), torch.tensor([[1.0, 0.0]])).tolist() == [True]


class _Away(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def test_the_order_of_attacks_decides_no_flag_and_no_score() -> None:
    transfer = NamedAttack(name="transfer", maximizer=PGD(10), objective=margin, surrogate=target())
    given = (*ATTACKS[:1], transfer, ATTACKS[2])
    one, other = (measured(target(_Away.apply), attacks=attacks) for attacks in (given, given[::-1]))
    assert {flag.name: flag.detail for flag in one.flags} == {flag.name: flag.detail for flag in other.flags}
    assert "transfer attack beats gradients" in names(one)
    assert other.attacks == one.attacks[::-1]
    assert torch.equal(other.scores.flip(1).nan_to_num(2.0), one.scores.nan_to_num(2.0))


UNDEFINED: dict[str, Callable[[Tensor], Tensor]] = {
    "a power": lambda x: (x / 3 + 1.5) ** 0.45,
    "a logarithm": lambda x: torch.log(x + 5),
}


@pytest.mark.parametrize("before", UNDEFINED.values(), ids=UNDEFINED)
def test_an_honest_model_that_is_undefined_far_away_is_measured_all_the_same(
    before: Callable[[Tensor], Tensor],
) -> None:
    found = measured(target(before), [{"image": L2(0.05)}], attacks=ATTACKS[:1])
    assert found.flags == ()
    undefined = "on 30 of 30 examples, answers that are not a number at the points of the check"
    assert found.about["checks"]["unlimited attack fails"] == (f"not made: image {undefined}; image+text {undefined}")


class _Plain(nn.Module):
    """Logits of a text, which the answer hangs on, and a hundredth of those of an image; texts may be of all images."""

    def __init__(self, seen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.regions, self.audio, self.seen = nn.Identity(), nn.Identity(), nn.Identity(), seen

    def forward(self, text: Tensor, image: Tensor, **others: Tensor) -> Tensor:
        found: Tensor = self.seen(self.words(text)) + self.regions(image) / 100
        return found


def plain(seen: Callable[[Tensor], Tensor], *, texts: int = 30, **sites: Site) -> Measurement:
    """Measure with a budget of the image alone."""
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (texts, 30))
    adapter = Adapter(_Plain(seen).eval(), {"text": Site("words"), "image": Site("regions")} | sites)
    batch = {"text": text, "image": image}
    with torch.no_grad():
        batch["labels"] = adapter.model(**batch).argmax(1)
    return worst_case(adapter, [batch], [{"image": L2(0.5)}], attacks=ATTACKS[1:2], targets=labels)


def test_gradients_that_vanish_in_a_modality_that_no_budget_names_are_flagged() -> None:
    found = plain(lambda text: text.detach())
    (flag,) = found.flags
    assert flag.name == "unlimited attack fails"
    assert "Without a limit on image+text, attacks by gradients leave 24 of 30 examples right" in flag.detail
    honest = plain(lambda text: text)
    assert honest.flags == ()
    assert honest.about["checks"]["unlimited attack fails"] == "made"


@pytest.mark.parametrize(
    ("seen", "options", "said"),
    [
        (lambda text: text.mean(0), {"texts": 3}, "image+text on 30 of 30 examples, no other example of its batch"),
        (lambda text: text.mean(0), {}, "image+text on 30 of 30 examples, rows that the answers of other examples"),
        (
            lambda text: text,
            {"audio": Site("audio")},
            "image+text+audio on 30 of 30 examples, a site that the batch does not reach",
        ),
    ],
    ids=["prompts of all images", "as many prompts as images", "no audio in the batch"],
)
def test_modalities_that_cannot_be_attacked_with_the_others_are_said_with_the_reason(
    seen: Callable[[Tensor], Tensor], options: dict[str, Any], said: str
) -> None:
    found = plain(seen, **options)
    assert found.flags == ()
    assert f"not made: {said}" in found.about["checks"]["unlimited attack fails"]


class _Pairs(nn.Module):
    """True or false of two images with one text each, of which examples may have other numbers of rows."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.regions, self.before = nn.Identity(), nn.Identity(), before
        self.layer = nn.Linear(8, 2, dtype=torch.float64)

    def forward(self, text: Tensor, image: Tensor, owner: Tensor, **others: Tensor) -> Tensor:
        rows = self.layer(torch.cat([self.words(text), self.before(self.regions(image))], dim=1))
        return rows.new_zeros(int(owner.max()) + 1, 2).index_add(0, owner, rows)


def paired(before: Callable[[Tensor], Tensor], owner: Tensor) -> Measurement:
    generator = torch.Generator().manual_seed(1)
    text, image = (torch.randn(len(owner), 4, generator=generator, dtype=torch.float64) for _ in range(2))
    site = {"examples": lambda batch: batch["owner"]}
    adapter = Adapter(_Pairs(before).eval(), {"text": Site("words", **site), "image": Site("regions", **site)})
    batch = {"text": text, "image": image, "owner": owner}
    with torch.no_grad():
        batch["labels"] = adapter.model(**batch).argmax(1)
    return worst_case(adapter, [batch], BUDGETS, attacks=ATTACKS[:2], targets=labels)


def test_examples_of_several_rows_are_replaced_as_a_whole() -> None:
    pairs = torch.arange(20).repeat_interleave(2)
    honest = paired(lambda x: x, pairs)
    assert honest.flags == ()
    checks = honest.about["checks"]
    assert checks["coupled examples"] == checks["unlimited attack fails"] == "made"
    assert names(paired(lambda x: x - x.mean(dim=0), pairs)) == {"coupled examples"}
    assert "unlimited attack fails" in names(paired(lambda x: 4 * x.detach().round(), pairs))
    mixed = torch.cat([pairs, torch.tensor([20])])  # one example of one row, which no other has
    alone = "on 1 of 21 examples, no other example of its batch has as many rows, or rows are not examples"
    found = paired(lambda x: x, mixed)
    assert found.flags == ()
    assert found.about["checks"]["unlimited attack fails"] == f"not made: image {alone}; image+text {alone}"


def test_doubts_stay_in_the_box() -> None:
    def gamma(x: Tensor) -> Tensor:
        assert x.min() >= -1e-6
        assert x.max() <= 1 + 1e-6
        return x.clamp(min=0)

    adapter = target(gamma)
    batch = toy_batch(30, dtype=torch.float32)
    batch["regions"] = batch["regions"].sigmoid()
    with torch.no_grad():
        batch["labels"] = adapter.model(**batch).argmax(1)
    found = worst_case(
        adapter, [batch], [{"image": Linf(0.02)}], attacks=ATTACKS[:1], boxes={"image": (0, 1)}, targets=labels
    )
    assert found.about["checks"]["unlimited attack fails"] == "made"


def test_checks_that_were_not_made_are_said_with_the_reason() -> None:
    adapter = target()
    checks = measured(adapter, BUDGETS, attacks=ATTACKS).about["checks"]
    assert checks.pop("transfer attack beats gradients") == "not made: no transfer attack was made"
    assert set(checks.values()) == {"made"}
    checks = measured(adapter, BUDGETS[:1], attacks=ATTACKS[2:], checks=False).about["checks"]
    assert checks["vanishing gradients"] == "not made: no attack asked for gradients"
    assert checks["random outputs"] == "not made: checks=False leaves it out"
    assert not any(said == "made" for said in checks.values())
    batch = labelled(adapter, 3)
    one = [{name: field[row : row + 1] for name, field in batch.items()} for row in range(3)]
    checks = worst_case(adapter, one, BUDGETS[:1], attacks=ATTACKS[:1], targets=labels).about["checks"]
    assert checks["unlimited attack fails"].startswith("not made: image on 3 of 3 examples, no other example")
    assert checks["accuracy rising with radius"] == "not made: no budget lies inside another of its kind"
    checks = measured(adapter, BUDGETS[:1], attacks=ATTACKS[2:]).about["checks"]
    assert "no attack by the model's own gradients" in checks["unlimited attack fails"]


def test_a_few_examples_that_luck_decides_raise_no_flag() -> None:
    found = measured(target(), BUDGETS, attacks=ATTACKS[1:])  # too few steps, and a random search behind them
    assert names(found) == set()


def test_without_the_passes_for_flags_only_those_of_the_attacks_are_raised() -> None:
    found = measured(FAKES["NaN gradients"][0], checks=False)
    assert names(found) == {"gradients not finite", "random search beats gradients"}
    assert found.unmoved.any()


def test_no_example_raises_no_flag() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert raised({"clean": nothing}, BUDGETS, ATTACKS) == ()
