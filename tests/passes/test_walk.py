"""A perturbation's walk through a training step changes file few times."""

from __future__ import annotations

from pathlib import Path

from support.walk import ROOT, walk

MOST = 192  # changes of file in one step of VILLA; 187 before cut batches and fp16 moves had checks of their own


def test_a_step_carries_its_perturbations_through_few_files() -> None:
    visits = [Path(file).relative_to(ROOT).parts[0] for file in walk().visits]
    assert {"passes", "adapters", "perturbers", "ops", "maximizers"} <= set(visits), "the walk lost its perturbations"
    assert len(visits) <= MOST
