"""The rows of UNITER's table: what each starts from and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toy import toy, toy_batch

from advvl.experiments.experiment import Row
from advvl.experiments.uniter import UniterOptions
from advvl.experiments.villa_options import VillaAdversary
from advvl.experiments.villa_rows import rows_of, training_of, update_cost
from advvl.maximizers.base import AscentState
from advvl.maximizers.freelb import FreeLB


def started(rows: list[Row]) -> list[tuple[str, str | None]]:
    return [(row.name, row.start.name if row.start else None) for row in rows]


def test_every_method_has_its_rows_and_stage_one_rows_of_its_own() -> None:
    assert started(rows_of(UniterOptions())) == [
        ("adversarial pre-training", None),
        ("standard pre-training", None),
        ("standard", "standard pre-training"),
        ("standard, equal compute", "standard pre-training"),
        ("FreeLB", "standard pre-training"),
        ("VILLA", "standard pre-training"),
        ("VILLA, stage one only", "adversarial pre-training"),
        ("VILLA, both stages", "adversarial pre-training"),
    ]
    assert [row.key for row in rows_of(UniterOptions(methods=("freelb",)))] == ["pretrained-standard", "freelb"]


def test_a_half_of_the_experiment_is_the_rows_of_its_stage() -> None:
    both = started(rows_of(UniterOptions()))
    assert started(rows_of(UniterOptions(stage="pretrain"))) == both[:2]
    assert started(rows_of(UniterOptions(stage="finetune"))) == both[2:]


def test_a_given_checkpoint_replaces_stage_one_and_its_rows() -> None:
    rows = rows_of(UniterOptions(methods=("standard", "villa"), checkpoint="there/c.pt"))
    assert started(rows) == [("standard", "c.pt"), ("VILLA", "c.pt")]
    every = rows_of(UniterOptions(checkpoint="there/c.pt"))
    assert [row.key for row in every] == ["standard", "standard-equal-compute", "freelb", "villa"]


def test_files_are_called_as_the_table_has_it_in_hyphens() -> None:
    assert [Row(name).key for name in ("Standard, equal compute", "PGD: 10 steps")] == [
        "standard-equal-compute",
        "pgd-10-steps",
    ]


@pytest.mark.parametrize(
    ("adversary", "units"),
    [
        (None, 3),
        (VillaAdversary(steps=3, modalities="together", kl_weight=0.0, clean_weight=0.0), 9),
        (VillaAdversary(steps=3, modalities="together", kl_weight=1.0, clean_weight=0.0, dropout="fresh"), 12),
        (VillaAdversary(steps=3, modalities="together", kl_weight=1.0, dropout="shared"), 10),
        (VillaAdversary(steps=3, modalities="in turn", kl_weight=1.0, dropout="fresh"), 21),
        (VillaAdversary(steps=3, modalities="in turn", kl_weight=0.0, clean_weight=0.5, dropout="fresh"), 21),
        (VillaAdversary(steps=3, modalities="in turn", kl_weight=1.0, dropout="shared"), 16),
        (VillaAdversary(steps=2, modalities="in turn", kl_weight=1.0, dropout="shared"), 10),
    ],
    ids=["plain", "freelb", "together", "together-shared", "in-turn", "in-turn-clean-loss", "in-turn-shared", "K2"],
)
def test_an_update_costs_its_forwards_and_backwards(adversary: VillaAdversary | None, units: int) -> None:
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
    villa = VillaAdversary(steps=3, modalities="in turn", dropout="shared")
    rows = {row.name: row for row in rows_of(UniterOptions(villa=villa))}
    assert rows["standard"].updates == 1
    assert rows["standard, equal compute"].updates == 16 / 3
    assert rows["standard, equal compute"].cost == rows["VILLA"].cost == 16


def test_each_row_perturbs_as_its_own_options_say() -> None:
    options = UniterOptions(
        villa=VillaAdversary(steps=2),
        freelb=VillaAdversary(steps=4),
        pretrain_adversary=VillaAdversary(steps=5),
    )
    methods = [row.method for row in rows_of(options)]
    found = [None if method is None else method.maximizer.steps for method in methods]  # type: ignore[attr-defined]
    assert found == [5, None, None, None, 4, 2, None, 2]


OTHERS = ("pgd", "free-at", "smart", "villa-text", "villa-image", "villa-together", "villa-no-kl", "villa-no-clean")


def test_other_methods_and_ablations_have_rows_that_step_and_cost_what_they_say() -> None:
    rows = rows_of(UniterOptions(methods=(*OTHERS, "villa-more-steps", "villa-near", "villa-far"), stage="finetune"))
    assert [row.key for row in rows] == [
        "pgd",
        "free-at",
        "smart",
        "villa-words-alone",
        "villa-regions-alone",
        "villa-together",
        "villa-without-kl",
        "villa-without-clean-loss",
        "villa-k-6",
        "villa-half-as-far",
        "villa-twice-as-far",
    ]
    moved = {row.key: row.method.perturber.modalities for row in rows if row.method}
    assert moved.pop("villa-words-alone") == ("text",)
    assert moved.pop("villa-regions-alone") == ("image",)
    assert set(moved.values()) == {("text", "image")}
    assert {row.key: row.method.maximizer.steps for row in rows if isinstance(row.method.maximizer, FreeLB)} == {  # type: ignore[union-attr]
        "villa-words-alone": 3,
        "villa-regions-alone": 3,
        "villa-together": 3,
        "villa-without-kl": 3,
        "villa-without-clean-loss": 3,
        "villa-k-6": 6,
        "villa-half-as-far": 3,
        "villa-twice-as-far": 3,
    }
    sizes = {row.key: row.method.perturber.ascents["image"].step_size for row in rows[-2:]}  # type: ignore[union-attr]
    assert sizes == {"villa-half-as-far": 0.1, "villa-twice-as-far": 0.4}


@pytest.mark.parametrize(("method", "passes", "units"), [("pgd", 4, 9), ("smart", 3, 8), ("free-at", 3, 9)])
def test_other_methods_cost_their_forwards_and_backwards(method: Any, passes: int, units: int) -> None:
    row = rows_of(UniterOptions(methods=(method,), stage="finetune"))[0]
    assert row.method is not None
    assert row.update_cost == units
    target, updates = toy(dropout=0.0), []

    def update() -> None:
        updates.append(1)
        target.model.zero_grad()

    free = method == "free-at"
    report = row.method.step(
        target, toy_batch(), update=update if free else None, state=AscentState() if free else None
    )
    assert report.passes == passes
    assert len(updates) * row.updates == int(free)
