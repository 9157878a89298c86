"""Attacks are as strong as they are known to be, on the published models in the folder that ADVVL_ORACLE names.

A short version; `benchmarks/test_attack_strength.py` is the long one. All of it is deterministic.
"""

from __future__ import annotations

import pytest
import torch
from support.oracle import load, names, right, robust_accuracy

from advvl import AutoPGD, RandomSearch

pytestmark = pytest.mark.slow

each_model = pytest.mark.parametrize("name", names())


@each_model
def test_a_known_model_is_as_good_as_its_folder_says(name: str) -> None:
    model = load(name)
    assert right(model).float().mean().item() == pytest.approx(model.clean, abs=1e-6)


@each_model
def test_few_steps_come_close_to_the_known_robust_accuracy(name: str) -> None:
    model = load(name)
    assert robust_accuracy(model, steps=20, restarts=1, size=0.25) <= model.robust_at_most + 0.03


@each_model
def test_auto_pgd_comes_as_close_without_a_step_size(name: str) -> None:
    model = load(name)
    alive = right(model) & model.attack(AutoPGD(40), "cross-entropy", seed=0, step=2.0)[0]
    assert alive.float().mean().item() <= model.robust_at_most + 0.03


@each_model
def test_random_search_breaks_images_without_a_gradient_and_fewer_than_gradients_do(name: str) -> None:
    model = load(name)
    clean = right(model)
    broken = clean & ~model.attack(RandomSearch(600), "margin", seed=0, step=2.0, start=False)[0]
    by_gradients = clean.sum() - model.robust_at_most * len(clean)
    assert broken.sum() >= 0.3 * by_gradients
    assert (clean & ~broken).float().mean().item() >= model.robust_at_most - 0.03
    assert torch.equal(right(model), clean)
