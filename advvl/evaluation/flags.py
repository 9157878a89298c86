"""Flags: signs that a measured robustness is not what it looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from advvl.evaluation.attempts import Plan
from advvl.evaluation.measurement import Budget, Flag
from advvl.evaluation.scoring import Batch


def doubts(plan: Plan, batch: Batch, number: int, clean: Tensor, worst: Tensor) -> dict[str, Tensor]:
    return {}


def raised(found: Mapping[str, Tensor], budgets: Sequence[Budget], attacks: Sequence[str]) -> tuple[Flag, ...]:
    return ()
