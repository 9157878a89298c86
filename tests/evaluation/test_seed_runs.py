"""Results of experiments over seeds, read back and put on a page: the figures of the experiment's own report."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from support.measurements import measurement

from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.comparisons import holm
from advvl.evaluation.page import page
from advvl.evaluation.page_seeds import seed_tables
from advvl.evaluation.report import to_csv, to_json, to_markdown, write_report
from advvl.evaluation.seed_runs import SeedRuns, check_same_test
from advvl.evaluation.summary import Condition, RunResult, Summary, summarise
from advvl.evaluation.summary_report import to_json as results_json
from advvl.files import write_json

EVIL = "<b>villa</b>"
RADII = {"image": (0.25, 0.5), "text": (0.1,)}


def results(seeds: int = 3, *, shift: int = 0) -> list[RunResult]:
    generator = torch.Generator().manual_seed(seeds)

    def scores(mean: float, count: int) -> list[float]:
        return (torch.rand(count, generator=generator) < mean).double().tolist()

    return [
        RunResult.of(
            method,
            seed + shift,
            clean=scores(mean, 60),
            attacked={name: {r: scores(mean - r, 40) for r in radii} for name, radii in RADII.items()},
        )
        for seed in range(seeds)
        for method, mean in (("standard", 0.7), (EVIL, 0.8))
    ]


def document(found: list[RunResult], **more: Any) -> tuple[Summary, dict[str, Any]]:
    report = summarise(found, baseline="standard")
    configuration = {"data": {"seed": 0, "images": 300}, "evaluation": {"steps": 20}}
    return report, {
        "label": "Preset evidence",
        "configuration": configuration,
        "chance": 0.25,
        **results_json(report, found),
        **more,
    }


def loaded(folder: Path, found: list[RunResult], **more: Any) -> tuple[Summary, SeedRuns]:
    report, content = document(found, **more)
    return report, SeedRuns.load(write_json(folder / "results.json", content))


@pytest.mark.parametrize("seeds", [1, 3])
def test_curves_have_the_intervals_of_the_experiments_own_report(seeds: int, tmp_path: Path) -> None:
    report, runs = loaded(tmp_path, results(seeds))
    assert list(runs.curves) == ["clean", "image (L2)", "text (L2)"]
    for kind, methods in runs.curves.items():
        modality = "" if kind == "clean" else kind.split()[0]
        for row in report.rows:
            curve = methods[row.method]
            found = curve.intervals()
            for radius, one in zip((0.0, *curve.radii), found, strict=True):
                own = row.accuracy[Condition(modality, radius)]
                assert (one.estimate, one.low, one.high) == pytest.approx((own.estimate, own.low, own.high), abs=1e-12)
            narrow, wide = (curve.intervals(confidence=c)[0] for c in (0.5, 0.99))
            assert wide.low < narrow.low <= narrow.high < wide.high


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    report, runs = loaded(tmp_path, results(4))
    (row,) = (row for row in report.rows if row.method == EVIL)
    found = runs.curves["image (L2)"][EVIL].less(runs.curves["image (L2)"]["standard"])
    assert found is not None
    for radius, one in zip((0.0, 0.25, 0.5), found, strict=True):
        own = row.difference[Condition("image", radius)]
        assert (one.estimate, one.low, one.high) == pytest.approx((own.estimate, own.low, own.high), abs=1e-12)


def test_differences_have_p_values_of_paired_t_tests_by_holms_correction(tmp_path: Path) -> None:
    _, runs = loaded(tmp_path, results(4))
    p_values = [
        p
        for methods in runs.curves.values()
        for p in methods[EVIL].p_values(methods["standard"]) or ()
        if p is not None
    ]
    mine, theirs = ([one[0] for one in runs.curves["clean"][m].accuracies.values()] for m in (EVIL, "standard"))
    assert p_values[0] == pytest.approx(stats.ttest_rel(mine, theirs).pvalue, rel=1e-9)
    (table,) = (one for one in seed_tables({"digits": runs}) if "difference" in one.title)
    shown = [cell.split(", p ")[1] for _, cell in table.rows if ", p " in cell]
    assert shown == [f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in holm(p_values)]
    assert len(shown) == len(table.rows) == 6


def test_seeds_that_are_not_common_are_no_pairs(tmp_path: Path) -> None:
    _, one = loaded(tmp_path, results(3))
    _, other = loaded(tmp_path, results(3, shift=2))
    mine, theirs = (runs.curves["image (L2)"]["standard"] for runs in (one, other))
    assert mine.less(theirs) is None
    assert mine.less(mine) is not None


def test_a_page_shows_them_alone_or_beside_measurements(tmp_path: Path) -> None:
    _, runs = loaded(tmp_path, results())
    alone = page({}, runs={"colours": runs})
    beside = page({"plain": measurement()}, runs={"colours": runs})
    for text, curves in ((alone, 2), (beside, 4)):
        assert text.count('<svg class="curve"') == curves
        assert "t-interval over seeds" in text
        assert "<b>" not in text
        assert "&lt;b&gt;villa&lt;/b&gt;" in text
        assert "Preset evidence" in text
        assert "data.images" in text
    assert "Accuracy under attack" in beside
    assert "No flag was raised" not in alone
    first = runs.curves["image (L2)"]["standard"].intervals()[1]
    assert f"{100 * first.estimate:.1f} [{100 * first.low:.1f}, {100 * first.high:.1f}]" in re.sub("<[^>]*>", "", alone)


def test_other_formats_have_every_method_and_radius(tmp_path: Path) -> None:
    _, runs = loaded(tmp_path, results())
    rows = list(csv.DictReader(io.StringIO(to_csv({}, runs={"colours": runs}))))
    assert len(rows) == 2 * (1 + 3 + 2)
    (row,) = (r for r in rows if (r["model"], r["perturbation"], r["radius"]) == ("standard", "image (L2)", "0.5"))
    own = runs.curves["image (L2)"]["standard"].intervals()[2]
    assert float(row["low"]) == own.low
    assert (row["interval"], row["examples"]) == ("t over 3 seeds", "40")
    said = to_json({}, runs={"colours": runs})["experiments"]["colours"]
    assert said["chance"] == 0.25
    assert len(said["accuracy"]) == len(rows)
    text = to_markdown({"plain": measurement()}, runs={"colours": runs})
    assert "## Experiments: difference to standard" in text
    assert "Holm's correction for all 6 of this table" in text
    assert "## Accuracy under attack" in text


def test_several_experiments_of_one_test_are_told_apart_by_their_names(tmp_path: Path) -> None:
    _, one = loaded(tmp_path, results(3))
    _, other = loaded(tmp_path, results(1))
    write_report(tmp_path / "page", {}, runs={"here": one, "there": other})
    text = (tmp_path / "page" / "report.html").read_text()
    for name in ("here: standard", "there: standard", "Wilson interval over examples where there is one seed"):
        assert name in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d["configuration"]["data"].update(seed=1),
            "got data.seed 0 of 'one' and 1 of 'other'; write a page",
        ),
        (lambda d: d["configuration"].pop("evaluation"), "got evaluation.steps 20 of 'one' and none of 'other'"),
        (lambda d: d.update(chance=0.5), "got chance 0.25 of 'one' and 0.5 of 'other'"),
        (lambda d: d.update(data_fingerprint="5e"), "got test data not known of 'one' and 5e of 'other'"),
        (lambda d: d.update(versions={"advvl": "9"}), "got versions not known of 'one' and none of 'other'"),
        (lambda d: [r["examples"].update({"image 0.25": 9, "image 0": 9, "image 0.5": 9}) for r in d["runs"]], "image"),
    ],
    ids=["data", "settings", "chance", "content", "versions", "examples"],
)
def test_experiments_of_other_data_or_settings_are_refused(
    change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path
) -> None:
    _, content = document(results())
    one = SeedRuns.load(write_json(tmp_path / "one.json", content))
    change(content)
    other = SeedRuns.load(write_json(tmp_path / "other.json", content))
    check_same_test({"one": one, "again": one})
    with pytest.raises(DataError, match=said):
        page({}, runs={"one": one, "other": other})


HUGE = 10**400
"""No float."""


def renamed(content: dict[str, Any], name: Any) -> None:
    """Give the baseline another name, in all its runs."""
    for run in content["runs"]:
        if run["method"] == content["baseline"]:
            run["method"] = name
    content["baseline"] = name


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("runs"),
        lambda d: d.update(baseline="none"),
        lambda d: d["runs"].append(d["runs"][0]),
        lambda d: d["runs"][0]["accuracy"].update(clean=1.5),
        lambda d: d["runs"][0]["accuracy"].update(clean=float("nan")),
        lambda d: d["runs"][0]["examples"].update(clean=0),
        lambda d: d["runs"][0]["examples"].update({"image 0.5": 7}),
        lambda d: d["methods"][0].update(conditions=d["methods"][0]["conditions"][:1]),
        lambda d: d["methods"][0]["conditions"].reverse(),
        lambda d: d.update(chance=2),
        lambda d: d.update(configuration=None),
        lambda d: d.update(methods=[]),
        lambda d: d["methods"][0].update(
            conditions=[one for one in d["methods"][0]["conditions"] if not one["radius"]]
        ),
        lambda d: d["methods"][0]["conditions"].append({"modality": "", "radius": 0.5}),
        lambda d: d["methods"][0]["conditions"][1].update(radius=HUGE),
        lambda d: d["runs"][0]["accuracy"].update(clean=HUGE),
        lambda d: [run["examples"].update(dict.fromkeys(run["examples"], HUGE)) for run in d["runs"]],
        lambda d: renamed(d, 7),
        lambda d: d.update(chance=HUGE),
    ],
    ids=[
        "runs",
        "baseline",
        "twice",
        "1.5",
        "nan",
        "0",
        "mixed",
        "no attack",
        "order",
        "chance",
        "configuration",
        "no methods",
        "no radii",
        "clean radii",
        "huge radius",
        "huge accuracy",
        "huge examples",
        "number as method",
        "huge chance",
    ],
)
def test_other_files_are_refused(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    _, content = document(results())
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"expected the results of an experiment in .*results.json") as found:
        SeedRuns.load(path)
    assert len(str(found.value)) < 600


def test_no_file_and_nothing_to_show_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results of an experiment in 'none\.json'"):
        SeedRuns.load("none.json")
    with pytest.raises(DataError, match="one measurement or more"):
        page({}, runs={})
    _, runs = loaded(tmp_path, results())
    with pytest.raises(ConfigurationError, match="confidence"):
        page({}, confidence=1.5, runs={"colours": runs})
