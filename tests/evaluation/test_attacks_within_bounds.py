"""Truth on both sides: no attack takes a margin below its certified bound, and every attack finds something."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.words_and_regions import WordsAndRegions, trained
from torch import Tensor, nn

from advvl import L2, PGD, Adam, Adapter, AutoPGD, Ball, FromClean, Linf, MinimumNorm, Momentum, RandomSearch, Site
from advvl.evaluation.attempts import searched
from advvl.evaluation.bounds import certified_margins
from advvl.evaluation.named_attacks import NamedAttack, all_random
from advvl.evaluation.objectives import as_scores, dlr, kl_from_clean, margin, targeted_margin, towards
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import answer_score, own_targets
from advvl.evaluation.worst_case import worst_case

BUDGETS: list[dict[str, Ball]] = [
    budget
    for radius in (0.4, 1.2)
    for budget in (
        {"text": L2(radius)},
        {"image": L2(radius)},
        {"text": L2(radius), "image": L2(radius)},
        {"text": Linf(radius / 4), "image": Linf(radius / 4)},
        {"text": L2(radius / 2, per="token")},
    )
]

ATTACKS: dict[str, dict[str, Any]] = {
    "FGSM": {"maximizer": PGD(1), "step_fraction": 1.0},
    "PGD": {"maximizer": PGD(10), "start": all_random},
    "PGD margin": {"maximizer": PGD(10), "objective": margin, "start": all_random},
    "momentum": {"maximizer": PGD(10), "rule": Momentum(0.9)},
    "Adam": {"maximizer": PGD(10), "rule": Adam()},
    "Auto-PGD": {"maximizer": AutoPGD(10), "step_fraction": 2.0},
    "Auto-PGD DLR": {"maximizer": AutoPGD(10), "objective": dlr, "step_fraction": 2.0},
    "minimum norm": {"maximizer": MinimumNorm(10), "objective": margin, "step_fraction": 1.0},
    "random search": {"maximizer": RandomSearch(40), "objective": margin, "step_fraction": 2.0},
    "transfer": {"maximizer": PGD(10), "objective": margin},
    "targeted": {"maximizer": PGD(10), "loss": towards(targeted_margin, rank=1)},
    "KL from clean": {"maximizer": PGD(10), "loss": FromClean(kl_from_clean)},
}


def adapted(network: nn.Module) -> Adapter:
    sites = {"text": Site("words", mask=lambda batch: batch["text_mask"]), "image": Site("regions")}
    return Adapter(network, sites, call=lambda model, batch: model(batch["text"], batch["image"], batch["text_mask"]))


@dataclass
class Known:
    """A network with the certified margin of each example within each budget `(R, B)`; another network to transfer from."""

    network: WordsAndRegions
    other: WordsAndRegions
    batch: dict[str, Tensor]
    least: Tensor


@pytest.fixture(scope="module")
def known() -> Known:
    network, batch = trained()
    batch = take_rows(batch, torch.arange(60))
    inputs = {name: x for name, x in batch.items() if name != "targets"}
    mask = {"text": batch["text_mask"]}
    least = [certified_margins(network, inputs, batch["targets"], budget, masks=mask) for budget in BUDGETS]
    return Known(network, trained(seed=1)[0], batch, torch.stack(least))


def attack_of(name: str, known: Known) -> NamedAttack:
    surrogate = adapted(copy.deepcopy(known.other)) if name == "transfer" else None
    return NamedAttack(name=name, surrogate=surrogate, **ATTACKS[name])


def margins(name: str, known: Known, r: int) -> list[Tensor]:
    """The margins `(B,)` under what an attack within a budget ended at and at the worst point that it saw."""
    target, attack = adapted(copy.deepcopy(known.network)), attack_of(name, known)
    made_on, found = attack.surrogate or target, []
    ascents = attack.ascents(BUDGETS[r], 0, {}, {})
    result = searched(attack, made_on, known.batch, ascents, own_targets, answer_score(made_on), seed=0)
    for deltas in (result.ended, result.worst):
        perturbed = {key: known.batch[key] + deltas.get(key, 0) for key in ("text", "image")}
        with torch.no_grad():
            logits = known.network(**perturbed, text_mask=known.batch["text_mask"])
        found.append(-margin(logits, as_scores(known.batch["targets"], logits)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_takes_a_margin_below_the_certified_one(name: str, known: Known) -> None:
    for r, least in enumerate(known.least):
        for attacked in margins(name, known, r):
            assert (attacked >= least).all()


@pytest.mark.slow
def test_an_attack_takes_margins_below_those_certified_within_less(known: Known) -> None:
    """So the test above can fail."""
    for r in range(5, 10):
        assert (margins("PGD margin", known, r)[1] < known.least[r - 5]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_succeeds_where_the_bounds_prove_that_none_can(name: str, known: Known) -> None:
    target = adapted(copy.deepcopy(known.network))
    measured = worst_case(target, [known.batch], BUDGETS, attacks=[attack_of(name, known)], checks=False)
    broken, proven = measured.worst() == 0, known.least > 0
    assert not (broken & proven).any()
    assert proven.sum() > 100  # the test sees both sides: examples that are safe, and attacks that succeed
    assert broken.sum() > 30
