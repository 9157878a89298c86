"""The rules of recipes: how many there are, how long, what they import; and the passes that a step of each runs."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from support.plain import pixel_net, pixels
from torch import nn

from advvl import Adapter, AdversarialTraining, Frozen, recipes
from advvl.recipes import agft, alum, awp, fare, fgm, fgsm_rs, pgd, pmg_aft, r_drop, sam, smart, tecoa, trades, vat

FOLDER = Path(recipes.__file__).parent
EXPORTED = {name: value for name, value in vars(recipes).items() if isinstance(value, FunctionType)}
LONGEST = 20


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def code_lines(function: ast.FunctionDef) -> int:
    """The lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    assert first.end_lineno is not None
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_there_are_24_recipes_or_more() -> None:
    assert len(EXPORTED) >= 24


@pytest.mark.parametrize("name", EXPORTED)
def test_a_recipe_is_a_short_function_in_a_file_of_its_own(name: str) -> None:
    """At most 20 lines, a docstring with its source, and no private helper beside it."""
    here = functions(FOLDER / f"{name}.py")
    assert set(here) == {name}
    assert code_lines(here[name]) <= LONGEST
    docstring = ast.get_docstring(here[name]) or ""
    assert any(year in docstring for year in map(str, range(2015, 2027)))


def test_the_count_of_lines_can_fail() -> None:
    long = "def f():\n    '''One.\n\n    Two.\n    '''\n" + "    x = 1\n" * LONGEST
    (function,) = ast.parse(long).body
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function) == LONGEST + 1


FEATURES: Any = {"reads": lambda outputs: outputs["features"]}
SMALL: Any = {"radius": 0.1, "step_size": 0.05}
TEXTS = torch.eye(5, 16, dtype=torch.float64)

# forwards, backwards to the parameters, forwards of a frozen copy; algorithms of one update
COSTS: dict[str, tuple[Callable[[nn.Module], AdversarialTraining], int, int, int]] = {
    "fgm": (lambda model: fgm(modality="image"), 2, 2, 0),
    "fgsm_rs": (lambda model: fgsm_rs(radius=0.1), 2, 1, 0),
    "pgd": (lambda model: pgd(**SMALL), 8, 1, 0),
    "trades": (lambda model: trades(**SMALL), 12, 2, 0),
    "vat": (lambda model: vat(radius=0.1), 3, 2, 0),
    "smart": (lambda model: smart(modality="image"), 3, 2, 0),
    "alum": (lambda model: alum(modality="image"), 3, 2, 0),
    "fare": (lambda model: fare(model, **SMALL, **FEATURES), 11, 1, 1),
    "tecoa": (lambda model: tecoa(TEXTS, **SMALL, **FEATURES), 11, 1, 0),
    "agft": (lambda model: agft(model, TEXTS, **SMALL, **FEATURES, temperature=2.0), 11, 1, 1),
    "pmg_aft": (lambda model: pmg_aft(model, TEXTS, **SMALL, **FEATURES), 4, 2, 1),
    "r_drop": (lambda model: r_drop(), 2, 2, 0),
    "sam": (lambda model: sam(), 2, 1, 0),
    "awp of pgd": (lambda model: awp(pgd(**SMALL)), 9, 1, 0),
    "awp of trades": (lambda model: awp(trades(**SMALL)), 14, 2, 0),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_passes_of_a_step(name: str) -> None:
    """A move costs a forward and a backward to its perturbation alone; a reference one forward a round."""
    make, forwards, backwards, of_reference = COSTS[name]
    target: Adapter = pixel_net(call=lambda model, batch: model(batch["x"], batch["labels"]))
    method, counts = make(target.model), {"forward": 0, "backward": 0, "reference": 0}
    batch = {"x": pixels()["x"], "labels": pixels()["y"]}
    if name == "vat":  # checks in its first step that replayed randomness repeats a pass
        method.step(target, batch)

    def count(what: str) -> Callable[..., None]:
        return lambda *_: counts.update({what: counts[what] + 1})

    target.model.head.register_forward_hook(count("forward"))
    target.model.head.weight.register_post_accumulate_grad_hook(count("backward"))
    target.model.mix.weight.register_post_accumulate_grad_hook(count("backward"))
    for one in method.regularizers:
        if isinstance(one.reference, Frozen):
            one.reference.frozen.register_forward_hook(count("reference"))
    target.model.zero_grad()
    method.step(target, batch)
    headless = name in ("fare", "tecoa", "agft", "pmg_aft")  # the loss is of the features
    assert counts == {
        "forward": forwards,
        "backward": backwards * (1 if headless else 2),
        "reference": of_reference,
    }
