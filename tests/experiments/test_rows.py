"""The rows of the table: what each starts from and costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.toy import toy, toy_batch

from advvl.experiments.options import AdversaryOptions, ExperimentOptions
from advvl.experiments.rows import adversary_of, rows_of, training_of, update_cost, updates_of

OPTIONS = ExperimentOptions()


def test_every_method_has_its_rows_and_stage_one_rows_of_its_own() -> None:
    assert [(row.name, row.start) for row in rows_of(("standard", "freelb", "villa"))] == [
        ("standard", "standard"),
        ("standard, equal compute", "standard"),
        ("freelb", "standard"),
        ("villa", "standard"),
        ("villa pre-training, standard", "adversarial"),
        ("villa pre-training, villa", "adversarial"),
    ]
    assert [row.key for row in rows_of(("freelb",))] == ["freelb"]


def test_a_given_checkpoint_replaces_stage_one_and_its_rows() -> None:
    rows = rows_of(("standard", "villa"), given=True)
    assert [(row.name, row.start) for row in rows] == [
        ("standard", "given"),
        ("standard, equal compute", "given"),
        ("villa", "given"),
    ]


@pytest.mark.parametrize(
    ("adversary", "units"),
    [
        (None, 3),
        (AdversaryOptions(steps=3, modalities="together", kl_weight=0.0, clean_weight=0.0), 9),
        (AdversaryOptions(steps=3, modalities="together", kl_weight=1.0, clean_weight=0.0, dropout="fresh"), 12),
        (AdversaryOptions(steps=3, modalities="together", kl_weight=1.0, dropout="shared"), 10),
        (AdversaryOptions(steps=3, modalities="in turn", kl_weight=1.0, dropout="fresh"), 21),
        (AdversaryOptions(steps=3, modalities="in turn", kl_weight=0.0, clean_weight=0.5, dropout="fresh"), 21),
        (AdversaryOptions(steps=3, modalities="in turn", kl_weight=1.0, dropout="shared"), 16),
        (AdversaryOptions(steps=2, modalities="in turn", kl_weight=1.0, dropout="shared"), 10),
    ],
    ids=["plain", "freelb", "together", "together-shared", "in-turn", "in-turn-clean-loss", "in-turn-shared", "K2"],
)
def test_an_update_costs_its_forwards_and_backwards(adversary: AdversaryOptions | None, units: int) -> None:
    assert update_cost(adversary) == units
    method = training_of(adversary)
    if method is None or adversary is None:
        return
    target = toy(dropout=0.1, dtype=torch.float32)
    batch = toy_batch(dtype=torch.float32)
    method.step(target, batch)  # with shared masks the first step verifies, once, that replay works
    backward_to_inputs = 1 if units % 3 else 0
    assert 3 * method.step(target, batch).passes + backward_to_inputs == units


def test_equal_compute_takes_as_many_updates_as_cost_what_villas_cost() -> None:
    plain, equal = rows_of(("standard",))[:2]
    options = replace(OPTIONS, villa=AdversaryOptions(steps=3, modalities="in turn", dropout="shared"))
    assert updates_of(plain, options, 100) == 100
    assert updates_of(equal, options, 100) == round(100 * 16 / 3)


def test_each_row_perturbs_as_its_own_options_say() -> None:
    options: Any = replace(OPTIONS, villa=AdversaryOptions(steps=2), freelb=AdversaryOptions(steps=4))
    found = {row.name: adversary_of(row, options) for row in rows_of(("standard", "freelb", "villa"))}
    assert [adversary and adversary.steps for adversary in found.values()] == [None, None, 4, 2, None, 2]
