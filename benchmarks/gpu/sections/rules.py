"""A step under every rule of the ascent and of every recipe, against as many bare passes of the model as it ran.

This is the one list of them: what the library at hand does not have yet is a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from test_step import Bench, Case

import advvl
from advvl import L2, PGD, AdversarialTraining, Ascent, EmbeddingPerturber, recipes
from benchmarks.gpu.setting import Setting, Skipped
from benchmarks.gpu.timing import Pace

STEP_SIZE, RADIUS = 1e-3, 1.0
SIZES = {"text": STEP_SIZE, "image": STEP_SIZE}

RULES: dict[str, Callable[[], Any]] = {
    "normalised": lambda: "normalised",
    "sign": lambda: "sign",
    "momentum": lambda: _named("Momentum")(),
    "Adam": lambda: _named("Adam")(),
}
RECIPES: dict[str, Callable[[], Any]] = {
    "villa": lambda: _recipe("villa")(step_sizes=SIZES),
    "freelb": lambda: _recipe("freelb")(step_sizes=SIZES),
    "pgd": lambda: _recipe("pgd")(step_size=STEP_SIZE, radius=RADIUS, steps=3),
    "free_at": lambda: _recipe("free_at")(radius=STEP_SIZE, replays=3, carry=False),
    "lxmert_adv": lambda: _recipe("lxmert_adv")("vqa"),
    "trades": lambda: _recipe("trades")(step_sizes=SIZES, radius=RADIUS),
    "vat": lambda: _recipe("vat")(step_sizes=SIZES, radius=RADIUS),
    "smart": lambda: _recipe("smart")(step_sizes=SIZES, radius=RADIUS),
    "fare": lambda: _recipe("fare")(step_sizes=SIZES, radius=RADIUS),
    "tecoa": lambda: _recipe("tecoa")(step_sizes=SIZES, radius=RADIUS),
    "neftune": lambda: _recipe("neftune")(),
}


def run(setting: Setting) -> None:
    bench = Bench(Case("toy", "both", rows=2) if setting.smoke else Case("tiny", "both", rows=32), setting.device)
    for name, rule in RULES.items():
        setting.measure(f"rule {name}", partial(_rule, setting, f"rule {name}", bench, rule))
    for name, make in RECIPES.items():
        setting.measure(f"recipe {name}", partial(_recipe_case, setting, f"recipe {name}", bench, make))


def _rule(setting: Setting, case: str, bench: Bench, rule: Callable[[], Any]) -> None:
    chosen = rule()
    ascents = {name: Ascent(L2(RADIUS), step_size=STEP_SIZE, rule=chosen) for name in SIZES}
    _against_bare(setting, case, bench, AdversarialTraining(EmbeddingPerturber(**ascents), PGD(3)))


def _recipe_case(setting: Setting, case: str, bench: Bench, make: Callable[[], Any]) -> None:
    _against_bare(setting, case, bench, make())


def _against_bare(setting: Setting, case: str, bench: Bench, method: AdversarialTraining) -> None:
    """The step's time over that of as many forward and backward passes."""
    passes: list[int] = []

    def step(inputs: dict[str, torch.Tensor]) -> None:
        method.step(bench.target, inputs, update=bench.model.zero_grad)  # FreeAT asks for one after every replay

    handle = bench.model.register_forward_hook(lambda *_: passes.append(1))
    ours = bench.update(step)
    try:
        ours()
    finally:
        handle.remove()
    for name, parameter in bench.model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"expected finite gradients, not of {name}"
    calls = {"ours": ours, "bare passes": bench.update(partial(bench.bare, count=len(passes)))}
    times = setting.times(calls, Pace(budget=1.5, least=5, most=30))
    measure = f"time over {len(passes)} bare passes"
    setting.ratio(case, measure, times, of="ours", over="bare passes", passes=len(passes))


def _recipe(name: str) -> Callable[..., AdversarialTraining]:
    found = getattr(advvl, name, None) or getattr(recipes, name, None)
    if not callable(found):
        raise Skipped(f"advvl has no recipe {name} yet")
    return found  # type: ignore[no-any-return]


def _named(name: str) -> Callable[..., Any]:
    found = getattr(advvl, name, None) or getattr(advvl.perturbers, name, None)
    if found is None:
        raise Skipped(f"advvl has no rule {name} yet")
    return found  # type: ignore[no-any-return]
