"""Curves, wins, comparisons and damages, of measurements whose figures are known."""

from __future__ import annotations

import math

import matplotlib.colors
import pytest
import torch
from support.measurements import BUDGETS, measurement
from torch import nn

from advvl import L2, PGD, Linf, adapt
from advvl.errors import DataError, MissingExtraError
from advvl.evaluation.comparisons import check_comparable, comparisons
from advvl.evaluation.curves import accuracies, curves_of, kind_of, wins
from advvl.evaluation.examples import damages
from advvl.evaluation.measurement import name_of
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.robustness import RobustnessCurve
from advvl.evaluation.statistics import paired_interval, proportion_interval
from advvl.evaluation.worst_case import worst_case

CURVE = RobustnessCurve(
    "image",
    (0.5, 2.0),
    torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
    torch.zeros(2, 4, dtype=torch.bool),
)


def of_image(model, batch):
    return model(batch["image"])


def test_budgets_that_lie_inside_one_another_make_a_curve_in_order_of_radius() -> None:
    budgets = ({"text": L2(2.0)}, {"image": L2(1.0)}, {"image": L2(0.5)}, {"image": Linf(0.5, per="token")})
    curves = curves_of(measurement([{}, {}, {}, {}], budgets=budgets[:3]))
    assert [(curve.kind, curve.radii, curve.places) for curve in curves] == [
        ("text (L2)", (2.0,), (0,)),
        ("image (L2)", (0.5, 1.0), (2, 1)),
    ]
    assert kind_of(budgets[3]) == "image (Linf per token)"
    assert name_of({**budgets[3], "text": L2(0.1)}) == "image Linf per token 0.5 + text L2 0.1"


def test_joint_budgets_of_which_none_holds_the_other_make_curves_apart() -> None:
    budgets = ({"image": L2(1.0), "text": L2(1.0)}, {"image": L2(2.0), "text": L2(0.5)})
    curves = curves_of(measurement([{}, {}], budgets=budgets))
    assert [curve.kind for curve in curves] == [
        "image (L2) + text (L2) from 1 + 1",
        "image (L2) + text (L2) from 2 + 0.5",
    ]


def test_an_unlimited_budget_is_in_no_curve_and_is_named() -> None:
    budgets = ({"image": L2(1.0)}, {"image": L2()})
    found = measurement([{}, {0: 0}], budgets=budgets)
    assert [curve.radii for curve in curves_of(found)] == [(1.0,)]
    assert name_of(budgets[1]) == "image L2 unlimited"
    assert accuracies(found)[2].estimate == 0.7


def test_a_loss_within_a_smaller_budget_counts_in_each_that_holds_it() -> None:
    found = measurement([{0: 0}, {1: 1}, {}])
    assert [one.estimate for one in accuracies(found)] == [0.8, 0.7, 0.6, 0.7]
    assert accuracies(found)[1] == proportion_interval(7, 10)


def test_the_attack_that_came_first_to_the_lowest_score_wins() -> None:
    found = measurement([{0: 0}, {0: 0, 1: 1}, {0: 0, 2: 1, 3: 1}])
    found.scores[1, :, 0] = 0.0  # both
    assert wins(found).tolist() == [[1, 0], [1, 1], [1, 2]]


def test_models_are_compared_example_by_example_and_corrected_for_all_comparisons() -> None:
    one, other = measurement([{}, {}, {}], examples=40), measurement([{}, {}, dict.fromkeys(range(12), 0)], examples=40)
    found = comparisons({"a": one, "b": other})
    assert [(row.first, row.second, row.budget) for row in found][::3] == [
        ("a", "b", "clean"),
        ("a", "b", "image L2 0.5 + text L2 0.1"),
    ]
    assert found[3].difference == paired_interval(one.worst()[2].tolist(), other.worst()[2].tolist())
    assert found[3].p_value == pytest.approx(4 * 2 * 0.5**12)  # four comparisons, twelve to none
    assert found[0].p_value == 1.0
    one.clean[0] = 0.3
    assert comparisons({"a": one, "b": other})[0].p_value is None


def test_damage_is_listed_by_loss_then_budget_then_length() -> None:
    found = measurement([{4: 1}, {0: 0, 1: 1}, {2: 0}])
    found.norms["image"][1, 1, 1] = 0.7
    assert [(one.example, one.budget, one.attack) for one in damages("m", found)] == [
        (4, 0, 1), (1, 1, 1), (0, 1, 0), (2, 2, 0),
    ]  # fmt: skip
    assert damages("m", found)[1].norms["image"] == 0.7
    assert damages("m", measurement([{}, {}, {}])) == ()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (measurement(about={"task": "ve"}), "same task.*'a'.*ve of 'b'"),
        (measurement(about={"data": {"keys": "2"}}), "same data"),
        (measurement(about={"versions": {"advvl": "2"}}), "same versions"),
        (measurement(about={"attacks": ["PGD(1)", "S(2)"]}), "same attacks.*none recorded of 'a'"),
        (measurement(about={"seed": 1}), "same seed"),
        (measurement(about={"draws": 2}), "same draws"),
        (measurement(about={"boxes": {"image": [0, 1]}}), "same boxes"),
        (measurement(about={"data_fingerprint": "f00"}), "same data fingerprint"),
        (measurement(examples=11), "same number of examples.*10 of 'a' and 11 of 'b'"),
        (measurement(budgets=(*BUDGETS[:2], {"image": L2(2.0)})), "same budgets"),
        (measurement(attacks=("gradients", "squares")), "same attacks"),
    ],
    ids=[
        "task",
        "data",
        "versions",
        "effort",
        "seed",
        "draws",
        "boxes",
        "fingerprint",
        "examples",
        "budgets",
        "attacks",
    ],
)
def test_results_that_differ_in_more_than_the_model_are_refused(other, said: str) -> None:
    check_comparable({"a": measurement(), "b": measurement()})
    with pytest.raises(DataError, match=said):
        check_comparable({"a": measurement(), "b": other})


def test_the_effort_of_attacks_that_differs_is_named_and_what_is_of_a_model_may_differ() -> None:
    one, other, same = (
        measurement(about={"attacks": ["PGD(5)", f"Search({count})"], "weights": count, "seconds": float(count)})
        for count in (1, 9, 1)
    )
    with pytest.raises(DataError, match=r"same attacks.*got 0 \(1 there, 9 here\), there of 'a' and here of 'b'"):
        check_comparable({"a": one, "b": other})
    same.about["weights"] = 2
    check_comparable({"a": one, "b": same})


def test_measurements_of_another_effort_are_refused() -> None:
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Identity(), nn.Linear(6, 4)).eval(), sites={"image": "0"}, call=of_image)

    x = torch.randn(8, 6)
    with torch.no_grad():
        batch = {"image": x, "targets": model.model(x).argmax(1)}

    def measured(steps: int):
        attack = NamedAttack(name="PGD", maximizer=PGD(steps))
        return worst_case(model, [batch], {"image": L2(0.3)}, attacks=[attack], checks=False)

    check_comparable({"a": measured(2), "b": measured(2)})
    with pytest.raises(DataError, match=r"same attacks to compare, got maximizer.steps \(1 there, 2 here\)"):
        check_comparable({"a": measured(1), "b": measured(2)})


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="expected one measurement or more"):
        check_comparable({})
    with pytest.raises(DataError, match="expected one example or more in 'a'"):
        check_comparable({"a": measurement([{}, {}, {}], examples=0, wrong=0)})


def test_a_robustness_curve_has_intervals_and_prints_as_a_table() -> None:
    assert CURVE.intervals(confidence=0.9) == tuple(proportion_interval(n, 4, confidence=0.9) for n in (3, 2, 0))
    assert str(CURVE).splitlines() == [
        "image (L2), 4 examples",
        "    radius  accuracy  95 % interval",
        "         0     75.0 %  [30.1, 95.4]",
        "       0.5     50.0 %  [15.0, 85.0]",
        "         2      0.0 %  [0.0, 49.0]",
    ]


def test_a_robustness_curve_becomes_a_data_frame_and_a_figure_to_scale() -> None:
    frame = CURVE.to_frame()
    assert frame["radius"].tolist() == [0.0, 0.5, 2.0]
    assert frame["accuracy"].tolist() == [0.75, 0.5, 0.0]
    assert (frame["low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["high"]).all()
    axes = CURVE.plot(label="plain")
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[0.0, 75.0], [0.5, 50.0], [2.0, 0.0]]
    band = axes.collections[0]
    assert matplotlib.colors.same_color(band.get_facecolor()[0][:3], line.get_color())
    assert axes.get_ylim() == (0, 100)
    assert CURVE.plot(axes=axes) is axes


@pytest.mark.parametrize(("view", "package"), [("to_frame", "pandas"), ("plot", "matplotlib.figure")])
def test_a_missing_extra_is_named(view: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"advvl\[report\]"):
        getattr(CURVE, view)()


def test_damage_names_the_budget_and_the_attack_of_the_lowest_score() -> None:
    found = measurement([{0: 0}, {}, {}])
    found.scores[0, 0, 0], found.scores[1, 1, 0] = 0.5, 0.25
    (one,) = damages("m", found)
    assert (one.budget, one.attack, one.worst) == (1, 1, 0.25)


def test_norms_that_are_not_known_sort_last() -> None:
    found = measurement([{0: 0, 1: 0}, {}, {}])
    found.norms["image"][0, 0, 0] = math.nan
    assert [one.example for one in damages("m", found)] == [1, 0]
