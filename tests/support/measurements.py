"""Measurements whose figures are known, for tests of what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from advvl import L2
from advvl.evaluation.measurement import Budget, Flag, Measurement

BUDGETS: tuple[Budget, ...] = ({"image": L2(0.5)}, {"image": L2(1.0)}, {"image": L2(0.5), "text": L2(0.1)})


def measurement(
    lost: Sequence[Mapping[int, int]] = ({0: 0}, {0: 0, 1: 1}, {0: 0, 2: 1}),
    *,
    examples: int = 10,
    wrong: int = 2,
    budgets: tuple[Budget, ...] = BUDGETS,
    attacks: tuple[str, ...] = ("gradients", "search"),
    flags: tuple[Flag, ...] = (),
    about: Mapping[str, Any] | None = None,
) -> Measurement:
    """A measurement of examples of which the last `wrong` are wrong before any attack.

    Arguments:
        lost: at each budget, the examples that are lost and the attack that takes them.
    """
    clean = torch.ones(examples, dtype=torch.float64)
    clean[examples - wrong :] = 0
    scores = torch.full((len(budgets), len(attacks), examples), math.nan, dtype=torch.float64)
    scores[:, :, : examples - wrong] = 1.0
    for r, found in enumerate(lost):
        for example, attack in found.items():
            scores[r, attack, example] = 0.0
            scores[r, attack + 1 :, example] = math.nan
    norms = {name: torch.full_like(scores, math.nan) for name in ("image", "text")}
    for r, budget in enumerate(budgets):
        for name, ball in budget.items():
            assert isinstance(ball, L2)
            norms[name][r] = torch.where(scores[r].isnan(), math.nan, ball.radius)
    still = torch.zeros_like(scores, dtype=torch.bool)
    return Measurement(budgets, attacks, clean, scores, norms, still, flags, {"task": "vqa", **(about or {})})
