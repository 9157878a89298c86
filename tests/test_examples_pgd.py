"""An experiment of one's own, under 60 lines: by its command line, and from the records that it left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support.examples import load_example
from support.spawn import Script

from advvl.errors import CheckpointError, ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.experiment import Row, Task
from advvl.experiments.runner import run
from advvl.fit.options import OptimizerOptions

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "pgd_digits.py"
FLAGS = {
    "finetune.epochs": 2,
    "evaluation.radii": 0.5,
    "evaluation.steps": 2,
    "evaluation.step_fraction": 0.5,
    "evaluation.restarts": 1,
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("pgd_digits")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves."""
    directory = tmp_path_factory.mktemp("pgd") / "out"
    flags = [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
    more = ("--jobs", 1, "--output", directory, "--device", "cpu", "--evaluation.examples", 40)
    status, said, complaints = Script(EXAMPLE, *more, *flags, folder=directory.parent).finish()
    assert status == 0, complaints
    assert (directory / "results.md").read_text() in said
    return directory


def test_it_is_under_60_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60


@pytest.mark.slow
def test_it_ends_with_a_table_a_plot_and_a_model_of_each_row(output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == ["standard", "pgd"]
    assert [c["condition"] for c in results["methods"][0]["conditions"]] == ["clean", "image 0", "image 0.5"]
    assert results["methods"][0]["conditions"][0]["accuracy"]["estimate"] > 0.3  # one in ten by chance
    left = {path.name for path in output.rglob("*") if path.is_file()}
    models = {f"{name}.{kind}" for name in ("standard", "pgd") for kind in ("safetensors", "json")}
    assert left == models | {"configuration.yaml", "results.json", "results.md", "accuracy_against_radius.png"}


@pytest.mark.slow
def test_what_is_done_is_taken_up_and_not_done_again(
    example: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advvl.experiments.runner.fit", None)
    before = (output / "results.md").read_text()
    evaluation = EvaluationOptions(radii=(0.5,), text_radii=(), steps=2, step_fraction=0.5, restarts=1, examples=40)
    options = example.Options(
        output=str(output),
        resume=True,
        jobs=1,
        finetune=OptimizerOptions(epochs=2),
        evaluation=evaluation,
    )
    run(example.PGD_DIGITS, options, progress=False)
    assert (output / "results.md").read_text() == before


def test_its_options_have_the_checks_of_every_experiment(example: ModuleType) -> None:
    for wrong in ({"seeds": (0, 0)}, {"seeds": (True,)}, {"jobs": 0}, {"jobs": "2"}, {"device": ""}, {"resume": "no"}):
        with pytest.raises(ConfigurationError, match=f"expected {next(iter(wrong))} to be .*, got "):
            example.Options(**wrong)


def test_a_start_that_is_not_there_is_refused_before_anything_is_written(example: ModuleType, tmp_path: Path) -> None:
    experiment = replace(example.PGD_DIGITS, rows=lambda options: [Row("late", start=tmp_path / "missing.pt")])
    with pytest.raises(CheckpointError, match=r"expected a file at .*missing\.pt', got none"):
        run(experiment, example.Options(output=str(tmp_path / "out"), jobs=1))
    assert not (tmp_path / "out").exists()


def test_a_task_is_named_by_its_seed_and_row() -> None:
    task = Task(3, Row("PGD, strong"))
    assert (task.name, task.record) == ("seed 3, PGD, strong", "seed-3/pgd-strong.json")
