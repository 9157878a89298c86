"""Worst-case scores, on linear models whose exact robust accuracy is known, and on the toy model."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from support.toy import ToyModel, toy, toy_batch, toy_sites
from torch import Tensor, nn

from advvl import Adapter, Site
from advvl.errors import ConfigurationError, DataError, NonFiniteError, SiteError
from advvl.evaluation.robustness import WorstCase, clean_scores, robustness_curve
from advvl.evaluation.rows import take_rows

pytestmark = pytest.mark.slow

CUT = partial(take_rows, whole=("position_ids",))


class Linear(nn.Module):
    """Logits `W x + b` of one position's features; counts the rows it has seen."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        self.rows = 0

    def forward(self, x: Tensor, targets: Tensor, position_ids: Tensor) -> Tensor:
        assert position_ids.shape == (1, 2)
        self.rows += len(x)
        logits: Tensor = self.dropout(self.head(x).squeeze(1))
        return logits


def linear(classes: int = 2, features: int = 6) -> Adapter:
    return Adapter(Linear(classes, features), {"image": Site("head", at="input")})


def examples(target: Adapter, count: int = 60, *, seed: int = 1) -> dict[str, Tensor]:
    """Random inputs, of which one in ten has a wrong label and one in fifteen no right answer at all."""
    generator = torch.Generator().manual_seed(seed)
    head = target.model.head
    x = torch.randn(count, 1, head.in_features, generator=generator, dtype=torch.float64)
    labels = head(x).squeeze(1).argmax(1)
    labels[::10] = (labels[::10] + 1) % head.out_features
    targets = nn.functional.one_hot(labels, head.out_features).double()
    targets[::15] = 0
    return {"x": x, "targets": targets, "position_ids": torch.arange(2)[None]}


def exact_margins(target: Adapter, batch: dict[str, Tensor]) -> Tensor:
    """`(B,)`: the L2 distance from each example to the nearest wrong answer's region; 0 if it is wrong already."""
    head, targets = target.model.head, batch["targets"]
    with torch.no_grad():
        logits = head(batch["x"]).squeeze(1)
        labels = targets.argmax(1)
        gaps = logits.gather(1, labels[:, None]) - logits
        distances = gaps / (head.weight[labels][:, None] - head.weight).norm(dim=2)
        distances[torch.arange(len(labels)), labels] = math.inf
        return torch.where(targets.any(1), distances.amin(1).clamp(min=0), 0)


def toy_target() -> Adapter:
    return toy(dropout=0.3)


def toy_targets(rows: int, *, seed: int = 0) -> dict[str, Tensor]:
    batch = toy_batch(rows, seed=seed)
    return {**batch, "labels": toy_labels(batch)}


def toy_labels(batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        model = toy_target().model.eval()
        labels: Tensor = model(**batch)["logits"].argmax(1)
        return labels


def one_hot(batch: Any) -> Tensor:
    return nn.functional.one_hot(batch["labels"], 4).double()


def toy_curve(
    attacks: WorstCase, *, radii: tuple[float, ...] = (2.0,), modality: str = "image", seed: int = 0
) -> Tensor:
    batches = [toy_targets(16)]
    curve = robustness_curve(
        toy_target(), batches, modality=modality, radii=radii, attacks=attacks, seed=seed, targets=one_hot
    )
    assert curve.clean.tolist() == [1.0] * 16
    return curve.scores


@pytest.mark.slow
def test_the_accuracy_of_a_linear_model_with_two_answers_is_exactly_the_known_one() -> None:
    target = linear(classes=2)
    batch = examples(target)
    margins = exact_margins(target, batch)
    ends = margins[margins > 0].sort().values
    # Radii half-way between two neighbouring margins: each counts one example more than the last, and no fewer.
    radii = tuple(((ends[:-1] + ends[1:]) / 2)[::6].tolist())
    curve = robustness_curve(target, [batch], modality="image", radii=radii)
    expected = torch.stack([(margins > radius).double() for radius in radii])
    torch.testing.assert_close(curve.scores, expected, rtol=0, atol=0)
    assert curve.accuracy() == tuple(expected.mean(1).tolist())
    assert curve.clean.mean() == (margins > 0).double().mean()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 5])
def test_with_more_answers_no_example_falls_that_cannot_and_each_falls_that_clearly_can(classes: int) -> None:
    target = linear(classes=classes)
    batch = examples(target)
    margins = exact_margins(target, batch)
    radii = (0.2, 0.5, 1.0)
    curve = robustness_curve(target, [batch], modality="image", radii=radii)
    for radius, scores in zip(radii, curve.scores, strict=True):
        assert (scores[margins > radius] == 1).all()
        assert (scores[margins < 0.85 * radius] == 0).all()


def test_an_example_is_not_attacked_once_it_has_nothing_to_lose() -> None:
    target = linear()
    batch = examples(target)
    margins = exact_margins(target, batch)
    attacks = WorstCase(steps=10, restarts=1, objectives=("margin",))
    radii = (0.3, 1e3)
    target.model.rows = 0
    robustness_curve(target, [batch], modality="image", radii=radii, attacks=attacks, rows=CUT)
    # The clean pass sees all, and so does a check of `rows`, with all but one after it; an attack of S steps runs S + 1
    # passes over those that are left.
    left = [(margins > 0).sum().item(), (margins > 0.3).sum().item()]
    assert target.model.rows == 3 * len(margins) - 1 + 11 * sum(left)


def test_nothing_is_run_once_every_example_is_broken() -> None:
    target = linear()
    batch = examples(target)
    attacks = WorstCase(steps=10, restarts=5)
    target.model.rows = 0
    curve = robustness_curve(target, [batch], modality="image", radii=(1e3, 1e4), attacks=attacks, rows=CUT)
    assert curve.scores.sum() == 0
    assert target.model.rows == 3 * len(batch["x"]) - 1 + 11 * int(curve.clean.sum())


class Wave(nn.Module):
    """Right where cos(x) is above 0: right again beyond the first region where it is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        wave = self.site(x).flatten(1).cos()
        return torch.cat([wave, torch.zeros_like(wave)], 1)


def test_what_is_broken_at_a_radius_is_broken_at_every_larger_one() -> None:
    target = Adapter(Wave(), {"image": Site("site")})
    batch = {"x": torch.full((1, 1, 1), 0.1), "targets": torch.tensor([[1.0, 0.0]])}
    # One step of the whole radius: past the region where it is wrong if the radius is 2π.
    attacks = WorstCase(steps=1, step_fraction=1.0, restarts=1, objectives=("margin",))

    def scores(*radii: float) -> list[float]:
        curve = robustness_curve(target, [batch], modality="image", radii=radii, attacks=attacks)
        return curve.scores.flatten().tolist()

    assert scores(2 * math.pi) == [1.0]
    assert scores(1.0, math.pi, 2 * math.pi) == [1.0, 0.0, 0.0]


def test_what_lowered_a_soft_score_at_a_radius_lowers_it_at_every_larger_one() -> None:
    target = Adapter(Wave(), {"image": Site("site")})
    batch = {"x": torch.full((1, 1, 1), 0.1), "targets": torch.tensor([[0.9, 0.3]], dtype=torch.float64)}
    attacks = WorstCase(steps=1, step_fraction=1.0, restarts=1, objectives=("cross-entropy",))
    curve = robustness_curve(target, [batch], modality="image", radii=(math.pi, 2 * math.pi), attacks=attacks)
    assert curve.scores.flatten().tolist() == [0.3, 0.3]


def test_every_point_on_the_way_counts_and_not_the_last_alone() -> None:
    target = Adapter(Wave(), {"image": Site("site")})
    batch = {"x": torch.full((1, 1, 1), 0.1), "targets": torch.tensor([[1.0, 0.0]])}
    # Steps of π from 0.1 up to 2π + 0.1, with a sure objective that pushes on: wrong at the first, right at the last.
    attacks = WorstCase(steps=2, step_fraction=0.5, restarts=1, objectives=("cross-entropy",))
    with torch.no_grad():
        last = target.model(torch.full((1, 1, 1), 0.1 + 2 * math.pi), batch["targets"])
    assert last[0, 0] > 0
    curve = robustness_curve(target, [batch], modality="image", radii=(2 * math.pi,), attacks=attacks)
    assert curve.scores.tolist() == [[0.0]]


@pytest.mark.parametrize(
    "attacks",
    [
        pytest.param(WorstCase(steps=1, restarts=4, objectives=("margin",)), id="restarts"),
        pytest.param(WorstCase(steps=8, restarts=1, objectives=("margin",)), id="steps"),
    ],
)
def test_more_attacks_can_only_lower_a_score(attacks: WorstCase) -> None:
    weak = WorstCase(steps=1, restarts=1, objectives=("margin",))
    before, after = toy_curve(weak), toy_curve(attacks)
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_every_restart_of_every_objective_is_run_on_what_holds() -> None:
    target = linear()
    batch = examples(target)
    target.model.rows = 0
    attacks = WorstCase(steps=4)
    curve = robustness_curve(target, [batch], modality="image", radii=(1e-9, 2e-9), attacks=attacks, rows=CUT)
    assert torch.equal(curve.scores, curve.clean.expand(2, -1))
    assert target.model.rows == 3 * len(batch["x"]) - 1 + 2 * 3 * 2 * 5 * int(curve.clean.sum())


def test_rows_left_alone_are_scored_as_in_the_whole_batch() -> None:
    target = linear(classes=3)
    batch = examples(target)
    arguments: dict[str, Any] = {"modality": "image", "radii": (0.2, 0.4), "attacks": WorstCase(steps=5, restarts=1)}
    whole = robustness_curve(target, [batch], **arguments)
    assert 0 < whole.scores.mean() < whole.clean.mean() < 1
    assert torch.equal(robustness_curve(target, [batch], rows=CUT, **arguments).scores, whole.scores)


class Prior(nn.Module):
    """Logits that are the inputs and a prior of the two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        return self.site(x) + prior  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda batch: batch, id="a mapping inside"),
        pytest.param(lambda batch: batch | {"x": list(batch["x"])}, id="a list"),
    ],
)
def test_a_batch_of_any_form_has_its_curve_and_a_constant_as_long_as_the_batch_stays_whole(form: Any) -> None:
    def call(model: nn.Module, batch: Any) -> Any:
        x = batch["inputs"]["x"]
        return model(torch.stack(x) if isinstance(x, list) else x, batch["inputs"]["prior"])

    target = Adapter(Prior(), {"image": Site("site")}, call=call)
    inputs = form({"x": torch.tensor([[0.0, 3.0], [0.0, 0.5]]), "prior": torch.tensor([1.0, -1.0])})
    batch = {"inputs": inputs, "targets": torch.tensor([0, 0])}
    attacks = WorstCase(steps=8, restarts=1)
    curve = robustness_curve(target, [batch], modality="image", radii=(1e-4, 2.0), attacks=attacks)
    assert curve.clean.tolist() == [0.0, 1.0]  # the second has a margin of 1.5
    assert curve.scores.tolist() == [[0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8], ids=str)
def test_class_ids_are_the_scores_that_are_1_for_them(dtype: torch.dtype) -> None:
    target = linear(classes=3)
    batch = examples(target)
    batch["targets"] = nn.functional.one_hot(batch["targets"].argmax(1), 3).double()
    ids = batch | {"targets": batch["targets"].argmax(1).to(dtype)}
    arguments: dict[str, Any] = {"modality": "image", "radii": (0.3,), "attacks": WorstCase(steps=5, restarts=1)}
    expected, found = (robustness_curve(target, [one], **arguments) for one in (batch, ids))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(clean_scores(target, [ids]), clean_scores(target, [batch]))
    assert 0 < found.scores.mean() < found.clean.mean()


@pytest.mark.parametrize("wrong", [-100, 3])
def test_an_id_of_no_class_is_refused(wrong: int) -> None:
    target = linear(classes=3)
    batch = examples(target)
    batch["targets"] = batch["targets"].argmax(1)
    batch["targets"][4] = wrong
    with pytest.raises(DataError, match=rf"class ids in 0\.\.2, got \[{wrong}\]"):
        clean_scores(target, [batch])


def test_a_function_that_gives_other_rows_than_asked_is_refused() -> None:
    target = linear()
    with pytest.raises(DataError, match="expected rows to give the 52 rows asked for, got 60"):
        robustness_curve(target, [examples(target)], modality="image", radii=(1.0,), rows=lambda batch, rows: batch)


def test_a_function_that_gives_rows_in_another_order_is_refused() -> None:
    target = linear()
    with pytest.raises(DataError, match="in that order, got others' targets"):
        robustness_curve(
            target,
            [examples(target)],
            modality="image",
            radii=(1.0,),
            rows=lambda batch, rows: CUT(batch, rows.flip(0)),
        )


def test_a_soft_score_falls_to_the_lowest_that_an_attack_reaches() -> None:
    # Two right answers of different worth, one on either side of the example; the wrong one is out of reach.
    target = linear(classes=3, features=1)
    with torch.no_grad():
        target.model.head.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0]]))
        target.model.head.bias.copy_(torch.tensor([0.0, 0.0, -50.0]))
    batch = {
        "x": torch.tensor([[[0.3]]], dtype=torch.float64),
        "targets": torch.tensor([[0.9, 0.3, 0.0]], dtype=torch.float64),
        "position_ids": torch.arange(2)[None],
    }
    curve = robustness_curve(target, [batch], modality="image", radii=(0.2, 0.5), seed=3)
    assert curve.clean.tolist() == [0.9]
    assert curve.scores[0].tolist() == [0.9]
    assert curve.scores[1].tolist() == [0.3]


@pytest.mark.slow
def test_examples_are_the_same_in_one_batch_and_in_several() -> None:
    target = linear()
    batch = examples(target)
    parts = [
        {"x": batch["x"][part], "targets": batch["targets"][part], "position_ids": batch["position_ids"]}
        for part in (slice(0, 25), slice(25, 26), slice(26, 60))
    ]
    whole = robustness_curve(target, [batch], modality="image", radii=(0.25, 0.5))
    split = robustness_curve(target, parts, modality="image", radii=(0.25, 0.5))
    torch.testing.assert_close(split.scores, whole.scores, rtol=0, atol=0)
    torch.testing.assert_close(split.clean, clean_scores(target, parts), rtol=0, atol=0)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_model_is_left_as_found(modality: str) -> None:
    target, batch = toy_target(), toy_targets(8)
    model = target.model.train()
    model.mix.eval()
    model.norm = nn.BatchNorm1d(4, dtype=torch.float64)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.words.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    robustness_curve(target, [batch], modality=modality, radii=(0.5, 1.0), targets=one_hot)
    clean_scores(target, [batch], targets=one_hot)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight"}
    assert model.head.weight.grad.eq(1).all()
    assert not model.words.weight.requires_grad


class Counting(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_buffers_that_every_forward_changes_are_put_back() -> None:
    target = Adapter(Counting().double(), toy_sites())
    clean_scores(target, [toy_targets(4)], targets=one_hot)
    robustness_curve(target, [toy_targets(4)], modality="image", radii=(0.5,), targets=one_hot)
    assert target.model.calls == 0


def test_modes_are_put_back_when_the_model_raises() -> None:
    target, batch = toy_target(), toy_targets(4)
    target.model.train()
    with pytest.raises(ConfigurationError, match="pass call="):
        clean_scores(target, [{"labels": batch["labels"]}], targets=one_hot)
    assert target.model.training


def test_dropout_plays_no_part() -> None:
    target, batch = toy_target(), toy_targets(16)
    target.model.train()
    assert clean_scores(target, [batch], targets=one_hot).tolist() == [1.0] * 16


def test_the_same_seed_gives_the_same_curve_and_another_seed_other_starts() -> None:
    attacks = WorstCase(steps=1, step_fraction=0.01, restarts=3)
    radii = (1.0, 2.0, 4.0, 8.0)
    first, again, other = (toy_curve(attacks, radii=radii, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("radii", [(), (1.0, 0.5), (0.5, 0.5), (0.0,), (math.inf,), (math.nan,)])
def test_radii_that_do_not_ascend_or_are_not_finite_are_refused(radii: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="expected finite radii above 0"):
        robustness_curve(toy_target(), [], modality="image", radii=radii)


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"restarts": 0}, {"step_fraction": 0.0}, {"objectives": ()}, {"objectives": ("loss",)}],
    ids=lambda options: next(iter(options)),
)
def test_attacks_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected .*, got"):
        WorstCase(**options)


def test_a_modality_that_the_model_lacks_is_named() -> None:
    with pytest.raises(SiteError, match="'audio'"):
        robustness_curve(toy_target(), [], modality="audio", radii=(1.0,))


def test_no_example_is_an_error() -> None:
    with pytest.raises(DataError, match="one example or more"):
        robustness_curve(toy_target(), [], modality="image", radii=(1.0,))
    with pytest.raises(DataError, match="one example or more"):
        clean_scores(toy_target(), [])


def test_a_batch_without_targets_is_named() -> None:
    with pytest.raises(DataError, match="'targets'"):
        clean_scores(toy_target(), [toy_targets(2)])


def test_targets_that_are_no_scores_are_refused() -> None:
    with pytest.raises(DataError, match=r"scores in \[0, 1\]"):
        clean_scores(toy_target(), [toy_targets(2)], targets=lambda batch: 2 * one_hot(batch))


def test_logits_that_are_not_a_number_judge_nothing() -> None:
    target, batch = toy_target(), toy_targets(2)
    with torch.no_grad():
        target.model.head.bias[0] = math.nan
    with pytest.raises(NonFiniteError, match="not a number"):
        clean_scores(target, [batch], targets=one_hot)


@pytest.mark.parametrize(
    ("boxes", "error", "words"),
    [({"imge": (0, 1)}, SiteError, "'imge'"), ({"image": 1}, ConfigurationError, "low < high")],
    ids=["modality", "box"],
)
def test_boxes_of_no_modality_are_refused_before_the_first_attack(
    boxes: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        robustness_curve(toy(), [], modality="image", radii=(0.5,), attacks=WorstCase(boxes=boxes))
