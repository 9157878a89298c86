"""A published method is the parts and the numbers that were published."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advvl import (
    KL,
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    FreeAT,
    FreeLB,
    Linf,
    Normal,
    Normalised,
    Objective,
    SymmetricKL,
    Uniform,
    Zero,
    fare,
    free_at,
    freelb,
    pgd,
    smart,
    tecoa,
    trades,
    vat,
    villa,
)
from advvl.errors import ConfigurationError
from advvl.recipes import awp, circuit_breakers, fgsm_rs, lat, modality_interference, r_drop, sam
from advvl.recipes import parts as shared_parts
from advvl.recipes.lxmert_adv import lxmert_adv
from advvl.recipes.villa_uniter import villa_uniter

SIZES = {"text": 0.1, "image": 0.2}


def parts(method: AdversarialTraining) -> tuple[object, ...]:
    ascents = method.perturber.ascents  # type: ignore[attr-defined]
    return ascents, method.maximizer, method.regularizer, method.clean_weight, method.dropout


def test_villa_is_what_was_released_for_vqa() -> None:
    text = Ascent(L2(math.inf), step_size=1e-3, start=Zero(), floor=1e-8)
    assert parts(villa()) == ({"text": text}, FreeLB(3, "together"), SymmetricKL(1.5), 0.0, "fresh")


def test_villa_takes_what_its_papers_algorithm_needs() -> None:
    method = villa(
        step_sizes=SIZES,
        steps=2,
        radius=0.5,
        kl_weight=1.0,
        norm="linf",
        modalities="in turn",
        clean_weight=0.5,
        dropout="shared",
    )
    ascents = {name: Ascent(Linf(0.5), step_size=size, floor=1e-8) for name, size in SIZES.items()}
    assert parts(method) == (ascents, FreeLB(2, "in turn"), SymmetricKL(1.0), 0.5, "shared")


@pytest.mark.parametrize(
    ("task", "step_size", "kl_weight"), [("vqa", 1e-3, 1.5), ("gqa", 1e-2, 1.5), ("nlvr2", 1e-3, 0.75)]
)
def test_lxmert_adv_is_what_was_released_for_its_tasks(task: Any, step_size: float, kl_weight: float) -> None:
    text = Ascent(L2(math.inf), step_size=step_size, start=Zero(), floor=1e-8)
    assert parts(lxmert_adv(task)) == ({"text": text}, FreeLB(3, "together"), SymmetricKL(kl_weight), 0.0, "fresh")
    assert parts(lxmert_adv()) == parts(lxmert_adv("vqa"))
    assert lxmert_adv(task, dropout="shared").dropout == "shared"


BOTH, WORDS = ("text", "image"), ("text",)


@pytest.mark.parametrize(
    ("task", "size", "modalities", "step_size", "kl_weight"),
    [
        ("vqa", "base", WORDS, 1e-3, 1.5),
        ("vqa", "large", WORDS, 2e-3, 1.0),
        ("nlvr2", "base", WORDS, 1e-3, 1.5),
        ("nlvr2", "large", WORDS, 1e-3, 1.5),
        ("ve", "base", WORDS, 1e-3, 1.5),
        ("ve", "large", WORDS, 1e-3, 1.5),
        ("vcr", "base", BOTH, 1e-2, 0.75),
        ("vcr", "large", BOTH, 1e-1, 0.5),
    ],
)
def test_villa_uniter_is_what_was_released_for_its_tasks(
    task: Any, size: Any, modalities: tuple[str, ...], step_size: float, kl_weight: float
) -> None:
    ascent = Ascent(L2(math.inf), step_size=step_size, start=Zero(), floor=1e-8)
    expected = dict.fromkeys(modalities, ascent), FreeLB(3, "together"), SymmetricKL(kl_weight), 0.0, "fresh"
    assert parts(villa_uniter(task, size)) == expected
    assert villa_uniter(task, size, dropout="shared").dropout == "shared"


def test_villa_uniters_defaults_are_villas() -> None:
    assert parts(villa_uniter()) == parts(villa())


@pytest.mark.parametrize("given", [("gqa", "base"), ("vqa", "huge"), (None, "base"), (["vqa"], "base")])
def test_what_villa_did_not_release_is_refused(given: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"task to be one of .* and size one of"):
        villa_uniter(*given)


def test_the_kl_of_nlvr2_is_the_mean_over_both_classes_too() -> None:
    clean, perturbed = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    published = sum(
        F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none").mean()
        for a, b in ((clean, perturbed), (perturbed, clean))
    )
    regularizer = lxmert_adv("nlvr2").regularizer
    assert regularizer is not None
    torch.testing.assert_close(regularizer(clean, perturbed), 1.5 * published, rtol=1e-12, atol=0)


@pytest.mark.parametrize("recipe", [villa, freelb])
@pytest.mark.parametrize("step_sizes", [0.1, [("text", 0.1)]])
def test_step_sizes_without_modalities_are_refused(recipe: Any, step_sizes: object) -> None:
    with pytest.raises(ConfigurationError, match="from modality to step size"):
        recipe(step_sizes=step_sizes)


def test_another_task_of_lxmert_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"task to be one of .*, got 'vcr'"):
        lxmert_adv("vcr")  # type: ignore[arg-type]


def test_freelb_has_no_clean_pass_and_starts_as_configured() -> None:
    assert parts(freelb()) == (
        {"text": Ascent(L2(), step_size=1e-1, start=Zero(), floor=1e-8)},
        FreeLB(3, "together"),
        None,
        0.0,
        "fresh",
    )
    method = freelb(step_sizes=SIZES, steps=4, init_magnitude=0.3, radius=0.7, modalities="in turn", dropout="shared")
    ascents = {n: Ascent(L2(0.7), step_size=s, start=Uniform(0.3), floor=1e-8) for n, s in SIZES.items()}
    assert parts(method) == (ascents, FreeLB(4, "in turn"), None, 0.0, "shared")


def test_free_at_takes_sign_steps_of_the_radius_and_carries() -> None:
    ascent = Ascent(Linf(0.25), step_size=0.25, rule="sign")
    assert parts(free_at(radius=0.25)) == ({"image": ascent}, FreeAT(8, carry=True), None, 0.0, "fresh")
    method = free_at(radius=0.25, modality="audio", replays=4, box=(0, 1), carry=False)
    boxed = Ascent(Linf(0.25), step_size=0.25, rule="sign", box=(0, 1))
    assert parts(method) == ({"audio": boxed}, FreeAT(4, carry=False), None, 0.0, "fresh")


@pytest.mark.parametrize(("norm", "ball", "rule"), [("linf", Linf, "sign"), ("l2", L2, "normalised")])
def test_pgd_starts_at_random_and_moves_by_the_steepest_step_of_its_norm(norm: str, ball: type, rule: str) -> None:
    method = pgd(radius=0.3, step_size=0.1, norm=norm, box=(0, 1))  # type: ignore[arg-type]
    ascent = Ascent(ball(0.3), step_size=0.1, start=Uniform(0.3), rule=rule, box=(0, 1))  # type: ignore[arg-type]
    assert parts(method) == ({"image": ascent}, PGD(7), None, 0.0, "fresh")
    assert parts(pgd(radius=0.3, step_size=0.1))[0] == {
        "image": Ascent(Linf(0.3), step_size=0.1, start=Uniform(0.3), rule="sign")
    }


def test_trades_climbs_the_divergence_alone_from_a_thousandth() -> None:
    method = trades(radius=0.031, step_size=0.007, box=(0, 1))
    ascent = Ascent(Linf(0.031), step_size=0.007, start=Normal(1e-3), rule="sign", box=(0, 1))
    assert parts(method) == ({"image": ascent}, PGD(10), KL(6.0), 1.0, "fresh")
    assert (method.teach, method.climb) == (Objective(task=0), None)


def test_vat_takes_one_step_in_shared_masks() -> None:
    method = vat(radius=8.0)
    assert parts(method)[1:] == (PGD(1), KL(detach_clean=True), 1.0, "shared")
    assert (method.teach, method.climb) == (Objective(task=0), None)


def test_smart_has_the_papers_numbers() -> None:
    method = smart()
    ascent = Ascent(Linf(1e-5, per="token"), step_size=1e-3, start=Normal(1e-5))
    assert parts(method) == ({"text": ascent}, PGD(1), (SymmetricKL(1.0),), 1.0, "fresh")
    assert (method.teach, method.climb) == (Objective(task=0), None)


def test_the_embedding_of_an_image_is_the_projected_one_or_the_pooled_one() -> None:
    projected, pooled = torch.ones(1, 2), torch.zeros(1, 3)
    assert shared_parts.image_embedding({"image_embeds": projected, "pooler_output": pooled}) is projected
    assert shared_parts.image_embedding({"image_embeds": None, "pooler_output": pooled}) is pooled
    with pytest.raises(ConfigurationError, match="expected outputs with image_embeds or pooler_output, got dict"):
        shared_parts.image_embedding({"logits": pooled})


def test_tecoa_takes_its_classes_from_the_texts() -> None:
    method = tecoa(torch.eye(3), radius=4 / 255, step_size=1 / 255, scale=2.0)
    ascent = Ascent(Linf(4 / 255), step_size=1 / 255, start=Uniform(4 / 255), rule="sign", box=(0.0, 1.0))
    assert parts(method) == ({"image": ascent}, PGD(10), None, 0.0, "fresh")
    assert method.teach.loss is not None
    losses = method.teach.loss({"image_embeds": 5 * torch.eye(3)}, {"labels": torch.tensor([0, 1, 0])})
    torch.testing.assert_close(losses, -torch.tensor([2.0, 2.0, 0.0]) + math.log(math.exp(2) + 2))


@pytest.mark.parametrize(
    "recipe",
    [
        lambda norm: villa(norm=norm),
        lambda norm: freelb(norm=norm),
        lambda norm: pgd(radius=1, step_size=1, norm=norm),
        lambda norm: trades(radius=1, step_size=1, norm=norm),
    ],
    ids=["villa", "freelb", "pgd", "trades"],
)
def test_an_unknown_norm_is_refused(recipe: Callable[[str], AdversarialTraining]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected norm to be one of \('l2', 'linf'\), got 'L2'"):
        recipe("L2")


NORMALISED = Normalised((0.5,), (0.2,))


@pytest.mark.parametrize(
    "recipe",
    [
        partial(free_at, radius=0.1),
        partial(pgd, radius=0.1, step_size=0.1),
        partial(trades, radius=0.1, step_size=0.1),
        partial(fare, nn.Linear(2, 2), radius=0.1, step_size=0.1),
        partial(tecoa, torch.eye(3), radius=0.1, step_size=0.1),
    ],
    ids=["free_at", "pgd", "trades", "fare", "tecoa"],
)
def test_a_recipe_of_pixels_takes_their_normalisation(recipe: Callable[..., AdversarialTraining]) -> None:
    raw, normalised = (parts(recipe(box=(0, 1), pixels=pixels))[0]["image"] for pixels in (None, NORMALISED))  # type: ignore[index]
    assert normalised == replace(raw, pixels=NORMALISED)


@pytest.mark.parametrize("recipe", [villa, freelb])
def test_step_sizes_may_come_first(recipe: Any) -> None:
    assert parts(recipe(SIZES)) == parts(recipe(step_sizes=SIZES))
    for wrong in ({"steps": SIZES}, {"radius": SIZES}, {"modalities": SIZES}, {"dropout": SIZES}, {"norm": SIZES}):
        with pytest.raises(ConfigurationError, match="expected"):
            recipe(**wrong)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fgsm_rs(radius="0.1"), "radius as a finite number above 0, got '0.1'"),
        (lambda: r_drop("x"), "alpha as a finite number above 0, got 'x'"),
        (lambda: r_drop(None), "alpha as a finite number above 0, got None"),
        (lambda: awp("x"), "a method such as pgd"),
        (lambda: sam(trades), "a method such as pgd"),
        (lambda: lat(3), "modalities as a list of names, .* got 3"),
        (lambda: lat("hidden"), "modalities as a list of names, .* got 'hidden'"),
        (lambda: modality_interference("text", radius=0.1, step_size=0.1), "modalities as a list of names"),
        (lambda: modality_interference([3], radius=0.1, step_size=0.1), "modalities as a list of names"),
        (lambda: circuit_breakers("abc", harmful=len, retained=len, progress=0.5), "layers as a list of names"),
        (lambda: circuit_breakers(None, harmful=len, retained=len, progress=0.5), "layers as a list of names"),
        (lambda: circuit_breakers(["a"], harmful=len, retained=len, progress=0.5, alpha="x"), "alpha as a finite"),
        (lambda: circuit_breakers(["a"], harmful=None, retained=len, progress=0.5), "harmful as a function"),
    ],
)
def test_arguments_that_a_recipe_computes_with_are_checked_by_their_names(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {words}"):
        make()
