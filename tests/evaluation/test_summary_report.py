"""Summary, tables, JSON and figure, from scores whose accuracies are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib import image
from scipy import stats

from advvl.errors import DataError, MissingExtraError
from advvl.evaluation.figures import write_figure
from advvl.evaluation.statistics import difference_interval, mean_interval, paired_interval, proportion_interval
from advvl.evaluation.summary import Condition, RunResult, Summary, summarise
from advvl.evaluation.summary_report import curve_figure, headline, markdown, to_json

EXAMPLES = 50


def scores(right: int, examples: int = EXAMPLES) -> list[float]:
    return [1.0] * right + [0.0] * (examples - right)


def run(method: str, seed: int, clean: int, *, image: dict[float, int], text: dict[float, int], time: float = 0.01):
    return RunResult.of(
        method,
        seed,
        clean=scores(clean),
        attacked={
            "image": {radius: scores(right, 40) for radius, right in image.items()},
            "text": {radius: scores(right) for radius, right in text.items()},
        },
        seconds_per_update=time,
    )


CLEAN, ATTACKED = Condition(), Condition("image", 0.5)
THREE_SEEDS = [
    run(method, seed, clean + seed, image={0.5: robust + 2 * seed, 0.25: 30}, text={1.0: 7}, time=time + seed / 1e3)
    for method, clean, robust, time in [("standard", 40, 10, 0.01), ("villa", 45, 20, 0.05)]
    for seed in (2, 0, 1)
]
ONE_SEED = [result for result in THREE_SEEDS if result.seed == 1]


def row(report: Summary, method: str):
    return next(row for row in report.rows if row.method == method)


def test_with_several_seeds_intervals_are_over_seeds_and_differences_paired_by_seed() -> None:
    report = summarise(THREE_SEEDS, baseline="standard")
    assert (report.over, report.seeds) == ("seeds", (0, 1, 2))
    assert row(report, "villa").accuracy[CLEAN] == mean_interval([45 / 50, 46 / 50, 47 / 50])
    assert row(report, "villa").accuracy[ATTACKED] == mean_interval([20 / 40, 22 / 40, 24 / 40])
    expected = difference_interval([20 / 40, 22 / 40, 24 / 40], [10 / 40, 12 / 40, 14 / 40])
    assert row(report, "villa").difference[ATTACKED] == expected
    assert row(report, "villa").seconds_per_update == mean_interval([0.05 + seed / 1e3 for seed in range(3)])
    assert row(report, "standard").difference == {}


def test_with_one_seed_intervals_are_over_examples_and_differences_paired_by_example() -> None:
    report = summarise(ONE_SEED, baseline="standard")
    assert (report.over, report.seeds) == ("examples", (1,))
    assert row(report, "villa").accuracy[ATTACKED] == proportion_interval(22, 40)
    assert row(report, "villa").difference[ATTACKED] == paired_interval(scores(22, 40), scores(12, 40))
    assert "paired by example, Agresti-Min interval" in markdown(report)
    assert report.examples[CLEAN] == 50
    assert report.examples[ATTACKED] == 40
    assert "seed 1 alone, Wilson interval over test examples" in markdown(report)


def test_the_text_says_what_stars_and_intervals_without_width_do_not_say() -> None:
    text = markdown(summarise(THREE_SEEDS, baseline="standard"), caption="From 50 examples.")
    assert text.startswith("From 50 examples.\n\nAccuracy")
    assert "Not corrected for the number of cells (5)" in text
    assert "one cell in 20" in text
    assert "paired by seed, t-interval" in text
    assert "An interval without width says" in text  # every seed's text accuracy is the same
    assert "without width" not in markdown(summarise(ONE_SEED, baseline="standard"))


def test_a_radius_of_zero_holds_the_clean_scores_of_the_examples_that_were_attacked() -> None:
    result = ONE_SEED[0]
    assert torch.equal(result.scores[Condition("image", 0.0)], result.scores[CLEAN][:40])
    assert list(result.scores) == [
        CLEAN,
        *(Condition("image", radius) for radius in (0.0, 0.25, 0.5)),
        *(Condition("text", radius) for radius in (0.0, 1.0)),
    ]


def test_the_table_shows_every_accuracy_with_its_interval() -> None:
    text = markdown(summarise(THREE_SEEDS, baseline="standard"))
    lines = [line.strip("|").split("|") for line in text.split("Difference")[0].splitlines() if line.startswith("| ")]
    assert all(len("|".join(line)) <= 98 for line in lines)
    width = len(lines) // 2  # two tables, one after the other
    joined = [[cell.strip() for cell in [*lines[i], *lines[i + width][1:]]] for i in range(width)]
    assert joined[0] == [
        "method", "clean", "clean, 40", "image 0.25", "image 0.5", "text 1", "ms per update",
    ]  # fmt: skip
    cells = joined[-1]
    low, high = (100 * end for end in (mean_interval([0.5, 0.55, 0.6]).low, mean_interval([0.5, 0.55, 0.6]).high))
    assert cells[0] == "villa"
    assert cells[4] == f"55.0 [{low:.1f}, {high:.1f}]"
    assert cells[6].startswith("51.0 [")
    assert all("[" in cell for cell in cells[1:])
    assert len({sum(map(len, line)) for line in lines[:width]}) == 1
    assert "95 % interval" in text
    assert "3 seeds" in text


def test_a_difference_carries_its_sign_and_a_star_where_the_interval_excludes_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = [
        RunResult.of("noisy", seed, clean=torch.rand(50, generator=generator).tolist(), attacked={})
        for seed in range(3)
    ]
    base = [
        RunResult.of("base", seed, clean=torch.rand(50, generator=generator).tolist(), attacked={}) for seed in range(3)
    ]
    sure = [RunResult.of("sure", seed, clean=[0.9 + 0.01 * seed] * 50, attacked={}) for seed in range(3)]
    worse = [RunResult.of("worse", seed, clean=[0.01 * seed] * 50, attacked={}) for seed in range(3)]
    text = markdown(summarise([*base, *noisy, *sure, *worse], baseline="base")).split("Difference to base")[1]
    cells = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ")
    }
    assert cells["sure"].startswith("+")
    assert cells["sure"].endswith("*")
    assert cells["worse"].startswith("-")
    assert cells["worse"].endswith("*")
    assert not cells["noisy"].endswith("*")


def test_two_stars_are_of_paired_t_tests_by_holms_correction() -> None:
    clean = {
        "base": [0.5, 0.52, 0.55, 0.51], "likely": [0.52, 0.55, 0.565, 0.535], "sure": [0.7, 0.725, 0.75, 0.715],
    }  # fmt: skip
    runs = [
        RunResult.of(method, seed, clean=[mean] * 50, attacked={})
        for method, means in clean.items()
        for seed, mean in enumerate(means)
    ]
    report = summarise(runs, baseline="base")
    for method in ("likely", "sure"):
        p_value = row(report, method).p_value[CLEAN]
        assert p_value == pytest.approx(stats.ttest_rel(clean[method], clean["base"]).pvalue, rel=1e-6)
    many = [replace(one, method=f"{one.method} {n}") for one in runs if one.method == "likely" for n in range(9)]
    alone, beside = (markdown(summarise(given, baseline="base")) for given in (runs, [*runs, *many]))
    assert "** where p < 0.05 by the paired t-test and Holm's correction for all 2." in alone
    assert ("**" in starred(alone, "likely"), "**" in starred(alone, "sure")) == (True, True)
    assert ("**" in starred(beside, "likely"), "**" in starred(beside, "sure")) == (False, True)
    assert "*" in starred(beside, "likely")
    assert "Holm" not in markdown(summarise(ONE_SEED, baseline="standard"))


def starred(text: str, method: str) -> str:
    lines = text.split("Difference to base")[1].splitlines()
    return next(line for line in lines if line.startswith(f"| {method} "))


def test_a_method_alone_has_no_table_of_differences() -> None:
    assert "Difference" not in markdown(summarise(ONE_SEED[:1], baseline="standard"))


def test_a_time_that_was_not_measured_is_shown_as_none() -> None:
    result = RunResult.of("a", 0, clean=scores(3), attacked={})
    report = summarise([result], baseline="a")
    assert report.rows[0].seconds_per_update is None
    assert markdown(report).splitlines()[4].endswith("| -             |")


def test_methods_keep_the_order_in_which_they_come() -> None:
    assert [row.method for row in summarise(THREE_SEEDS[::-1], baseline="standard").rows] == ["villa", "standard"]


@pytest.mark.parametrize(
    ("results", "baseline", "message"),
    [
        pytest.param([], "standard", "one result or more", id="none"),
        pytest.param(ONE_SEED, "freelb", r"baseline among the methods \['standard', 'villa'\], got 'freelb'", id="baseline"),
        pytest.param(THREE_SEEDS[:-1], "standard", "the same seeds", id="a-seed-is-missing"),
        pytest.param([*ONE_SEED, ONE_SEED[0]], "standard", "two for seed 1", id="a-seed-twice"),
        pytest.param(
            [ONE_SEED[0], RunResult.of("villa", 1, clean=scores(3), attacked={})], "standard",
            r"expected the conditions .*clean \(50\), image 0 \(40\).*got clean \(50\) from 'villa', seed 1",
            id="conditions",
        ),
    ],
)  # fmt: skip
def test_results_that_cannot_be_compared_are_refused(results: list[RunResult], baseline: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise(results, baseline=baseline)


def test_the_json_holds_every_accuracy_interval_and_run() -> None:
    report = summarise(THREE_SEEDS, baseline="standard")
    content = json.loads(json.dumps(to_json(report, THREE_SEEDS), allow_nan=False))
    villa = content["methods"][1]
    entry = next(entry for entry in villa["conditions"] if entry["condition"] == "image 0.5")
    interval = row(report, "villa").accuracy[ATTACKED]
    assert entry["accuracy"]["interval"] == [interval.low, interval.high]
    assert entry["difference"]["estimate"] == pytest.approx(0.25)
    assert [run["seed"] for run in content["runs"]] == [2, 0, 1, 2, 0, 1]
    assert content["runs"][1]["accuracy"]["clean"] == 0.8
    assert content["runs"][1]["examples"] == {
        "clean": 50, "image 0": 40, "image 0.25": 40, "image 0.5": 40, "text 0": 50, "text 1": 50,
    }  # fmt: skip
    json.dumps(to_json(summarise(ONE_SEED, baseline="villa"), ONE_SEED), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("results", [THREE_SEEDS, ONE_SEED], ids=["three-seeds", "one-seed"])
def test_the_figure_is_a_picture_of_two_panels_that_is_not_empty(results: list[RunResult], tmp_path: Path) -> None:
    pixels = image.imread(write_figure(curve_figure(summarise(results, baseline="standard")), tmp_path / "curve.png"))
    assert pixels.shape[:2] == (780, 1650)
    assert len({tuple(colour) for colour in pixels[::3, ::3].reshape(-1, pixels.shape[2]).round(2).tolist()}) > 10


def test_in_the_figure_the_radius_is_to_scale_and_every_point_whole_on_the_paper() -> None:
    """Six methods that agree, at 0 too: no point hides another or is cut, and each stands nearest to its own radius."""
    same = {"image": {0.25: scores(20), 0.5: scores(5), 1.0: scores(0)}}
    results = [RunResult.of(f"method {i}", 0, clean=scores(40), attacked=same) for i in range(6)]
    figure = curve_figure(summarise(results, baseline="method 0"), title="Six", chance=0.25)
    (panel,) = figure.axes
    lines = [container.lines[0] for container in panel.containers]
    radii = [0.0, 0.25, 0.5, 1.0]
    for column, radius in enumerate(radii):
        places = [line.get_xdata()[column] for line in lines]
        assert len({round(place, 6) for place in places}) == 6
        assert all(abs(place - radius) < 0.03 for place in places)
    assert panel.get_xticks().tolist() == radii
    assert panel.get_xlim()[0] < -0.02
    assert panel.get_ylim()[0] < -1
    chance = next(line for line in panel.get_lines() if str(line.get_label()).startswith("chance"))
    assert list(chance.get_ydata()) == [25, 25]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 6
    assert "50 test examples" in panel.get_xlabel()
    assert "bars: 95 % Wilson interval over test examples" in figure.get_suptitle()


def test_an_accuracy_and_its_interval_stay_between_0_and_1() -> None:
    runs = [RunResult.of("a", seed, clean=scores(right), attacked={}) for seed, right in enumerate([0, 0, 5])]
    interval = summarise(runs, baseline="a").rows[0].accuracy[CLEAN]
    assert interval.low == 0


def test_the_headline_says_both_numbers_their_difference_and_whether_it_is_sure() -> None:
    text = markdown(summarise(THREE_SEEDS, baseline="standard"))
    assert "villa against standard: 92.0 % against 82.0 %, +10.0 [+10.0, +10.0] points;\nunder attack (image" in text
    worse = [run("VILLA", 1, 41, image={0.5: 12}, text={}), run("standard", 1, 40, image={0.5: 12}, text={})]
    assert headline(summarise(worse, baseline="standard")).count("which may be none") == 2


def test_without_an_attack_there_is_no_figure() -> None:
    result = RunResult.of("a", 0, clean=scores(3), attacked={})
    with pytest.raises(DataError, match="no curve to draw"):
        curve_figure(summarise([result], baseline="a"))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report = summarise(ONE_SEED, baseline="standard")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"advvl\[report\]"):
        curve_figure(report)
