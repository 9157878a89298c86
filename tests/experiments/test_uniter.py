"""The experiment: stages, rows, records, and that nothing finished is lost or done again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.tiny import tiny

import advvl.experiments.runner
import advvl.models.uniter.checkpoint
from advvl.errors import CheckpointError, ConfigurationError, OutputDirectoryError
from advvl.experiments.config import identity
from advvl.experiments.experiment import Row, Task
from advvl.experiments.outputs import claim
from advvl.experiments.progress import Progress
from advvl.experiments.records import sha256
from advvl.experiments.runner import run, tasks_of
from advvl.experiments.uniter import UNITER, UniterOptions
from advvl.experiments.villa_rows import rows_of
from advvl.files import only_writer, write_json
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.models.uniter.model import UniterConfig, UniterModel
from advvl.training import AdversarialTraining

pytestmark = pytest.mark.slow

MODELS = [row.key for row in rows_of(UniterOptions())]
ROWS = [row for row in rows_of(UniterOptions()) if row.stage == "finetune"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    quietly(tiny(output))
    return output


def quietly(options: UniterOptions) -> None:
    run(UNITER, options, progress=False)


def bits(output: Path, seed: int = 0) -> dict[str, bytes]:
    return {name: (output / f"seed-{seed}" / f"{name}.safetensors").read_bytes() for name in MODELS}


def record(output: Path, name: str, seed: int = 0) -> dict[str, Any]:
    """A record without what differs between equal runs."""
    found: dict[str, Any] = json.loads((output / f"seed-{seed}" / f"{name}.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("seconds")}


def same(left: Path, right: Path) -> None:
    assert bits(left) == bits(right)
    for name in MODELS:
        assert record(left, name) == record(right, name)


def test_everything_lies_under_the_output_directory(whole: Path) -> None:
    found = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    expected = {f"seed-0/{name}.{kind}" for name in MODELS for kind in ("safetensors", "json")}
    reports = {"configuration.yaml", "results.json", "results.md", "accuracy_against_radius.png"}
    assert found == expected | reports
    assert (whole / "accuracy_against_radius.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_row_and_says_that_one_seed_is_no_evidence(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quietly(tiny(whole, resume=True))
    said = capsys.readouterr().out
    table = (whole / "results.md").read_text()
    assert table in said
    assert "Quick demo, one seed: not evidence" in table
    assert all(f"| {row.name} " in table for row in ROWS)
    heads = next(line for line in table.splitlines() if line.startswith("| method"))
    assert [cell.strip() for cell in heads.strip("|").split("|")][1:4] == ["clean", "clean, 12", "image 0.5"]
    assert "VILLA against standard: " in table
    assert all(len(line) <= 100 for line in table.splitlines() if line.startswith("|"))
    assert 0 < json.loads((whole / "results.json").read_text())["chance"] < 1
    assert "Clean: 24 test examples; attacked: the first 12 of them; seed 0.\n" in table
    attacks = tiny(whole).evaluation
    said_attack = f"{attacks.steps} steps of {attacks.step_fraction:g} of the radius,\nrestarts: {attacks.restarts}"
    assert said_attack in table
    assert f"objectives: {', '.join(attacks.objectives)}" in table
    assert "this call took 0 min" in said
    assert f"the updates of {len(MODELS)} models, whichever call did them, 0 min" in said


def test_results_say_what_the_records_say(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["label"] == "Quick demo, one seed: not evidence"
    assert results["configuration"]["villa"]["steps"] == 2
    for row, method, facts in zip(ROWS, results["methods"], results["training"], strict=True):
        found = record(whole, row.key)
        assert method["method"] == facts["method"] == row.name
        clean = method["conditions"][0]["accuracy"]["estimate"]
        assert clean == pytest.approx(sum(found["scores"]["clean"]) / 24)
        assert [len(found["scores"]["image"][radius]) for radius in ("0.5", "1.0")] == [12, 12]
        assert facts["updates"] == found["updates"] == (6 * 10 // 3 if row.key == "standard-equal-compute" else 6)


def test_all_rows_of_a_seed_start_from_the_checkpoint_they_name(whole: Path) -> None:
    for row in ROWS:
        start = record(whole, row.key)["start"]
        assert isinstance(row.start, Row)
        assert start["file"] == f"{row.start.key}.safetensors"
        assert start["sha256"] == record(whole, row.start.key)["sha256"]
    assert len({record(whole, name)["sha256"] for name in MODELS}) == len(MODELS)


@pytest.mark.slow
def test_stage_one_perturbs_masked_words_and_matching_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed: list[str] = []
    step = AdversarialTraining.step

    def watch(self: AdversarialTraining, target: Any, batch: Any, **arguments: Any) -> Any:
        perturbed.append(batch["task"])
        return step(self, target, batch, **arguments)

    monkeypatch.setattr(AdversarialTraining, "step", watch)
    quietly(tiny(tmp_path / "out", stage="pretrain", pretrain={"epochs": 5, "batch_size": 16}))
    assert set(perturbed) == {"mlm", "itm"}
    assert len(perturbed) < 5 * 4
    assert not (tmp_path / "out" / "results.json").exists()


class Stop(Exception):
    """Stands for a kill at this moment."""


RUNNER, CHECKPOINT = advvl.experiments.runner, advvl.models.uniter.checkpoint
MOMENTS = [(RUNNER, "attacked_scores"), (CHECKPOINT, "write_state"), (RUNNER, "write_json"), (RUNNER, "fit")]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment[1])
@pytest.mark.parametrize("at", [0, 3])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits_and_numbers(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple[ModuleType, str], at: int
) -> None:
    output = tmp_path / "out"
    count = calls(monkeypatch, *moment, stop_at=at)
    with pytest.raises(Stop):
        quietly(tiny(output))
    assert count() == at + 1
    monkeypatch.undo()
    trained = calls(monkeypatch, RUNNER, "fit")
    done = len(list(output.glob("seed-0/*.json")))
    quietly(tiny(output, resume=True))
    assert trained() == len(MODELS) - done
    same(output, whole)
    assert not list(output.rglob("*.progress.pt"))


def calls(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, *, stop_at: int | None = None
) -> Callable[[], int]:
    """Count the calls of a module's function, the one of number `stop_at` being the last."""
    function, seen = getattr(module, name), []

    def counting(*arguments: Any, **options: Any) -> Any:
        seen.append(name)
        if stop_at is not None and len(seen) > stop_at:
            raise Stop
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return lambda: len(seen)


def test_a_finished_run_resumes_to_its_table_without_training(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = calls(monkeypatch, RUNNER, "fit")
    table = (whole / "results.md").read_text()
    quietly(tiny(whole, resume=True))
    assert trained() == 0
    assert (whole / "results.md").read_text() == table


@pytest.mark.slow
def test_the_halves_run_one_after_the_other_are_the_whole(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quietly(tiny(output, stage="pretrain"))
    assert sorted(path.stem for path in output.glob("seed-0/*.json")) == sorted(MODELS[:2])
    quietly(tiny(output, stage="finetune", resume=True))
    same(output, whole)


@pytest.mark.slow
def test_methods_can_be_run_one_by_one(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quietly(tiny(output, methods=["freelb"]))
    assert {path.stem for path in output.glob("seed-0/*.json")} == {"pretrained-standard", "freelb"}
    quietly(tiny(output, resume=True))
    same(output, whole)


@pytest.mark.slow
def test_seeds_can_be_added(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    quietly(tiny(output, seeds=[0, 1], resume=True))
    same(output, whole)
    assert bits(output, 1) != bits(output, 0)
    assert "mean of 2 seeds" in (output / "results.md").read_text()


def test_fine_tuning_without_its_stage_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--stage pretrain"):
        quietly(tiny(tmp_path / "out", stage="finetune"))


@pytest.mark.slow
def test_results_of_the_same_configuration_are_taken_up_or_lost_only_when_told(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "seed-0" / "villa.json").write_text("stale")
    with pytest.raises(OutputDirectoryError, match=r"--resume .* --overwrite"):
        quietly(tiny(output))
    assert (output / "seed-0" / "villa.json").read_text() == "stale"
    quietly(tiny(output, overwrite=True))
    same(output, whole)


def test_another_configuration_is_refused(whole: Path) -> None:
    with pytest.raises(OutputDirectoryError, match=r"villa\.steps \(2 there, 3 here\)"):
        quietly(tiny(whole, villa={"steps": 3}, resume=True))


@pytest.mark.slow
def test_a_given_checkpoint_replaces_stage_one(whole: Path, tmp_path: Path) -> None:
    """One that this wrote, given back, makes the very models that stage one would have led to."""
    output, given = tmp_path / "out", whole / "seed-0" / "pretrained-standard.safetensors"
    quietly(tiny(output, checkpoint=str(given), methods=["standard", "villa"]))
    assert {path.stem for path in output.glob("seed-0/*.json")} == {"standard", "villa"}
    for name in ("standard", "villa"):
        model = Path("seed-0", f"{name}.safetensors")
        assert (output / model).read_bytes() == (whole / model).read_bytes()
    with pytest.raises(ConfigurationError, match="stage"):
        quietly(tiny(tmp_path / "other", checkpoint=str(given), stage="pretrain"))


@pytest.mark.slow
def test_a_checkpoint_of_other_sizes_is_refused_with_what_differs_and_what_fits(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    given = tmp_path / "official.safetensors"
    save_checkpoint(UniterModel(UniterConfig(vocab_size=500, img_dim=20, max_position_embeddings=512, **size)), given)
    with pytest.raises(CheckpointError) as caught:
        quietly(tiny(tmp_path / "out", checkpoint=str(given)))
    message = str(caught.value)
    for part in ("word_embeddings.weight: expected shape", "found (500, 8)", "features of 64", "pretrained-*"):
        assert part in message


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        quietly(tiny(tmp_path / "out", checkpoint=str(tmp_path / "missing.pt")))


def test_stage_one_comes_before_its_rows_and_long_work_before_short(tmp_path: Path) -> None:
    tasks = tasks_of(rows_of(tiny(tmp_path)), (0, 1))
    assert [task.seed for task in tasks] == [0] * 8 + [1] * 8
    names = [task.row.name for task in tasks[:8]]
    assert names[:2] == ["adversarial pre-training", "standard pre-training"]
    assert names[5:] == ["standard", "VILLA, both stages", "VILLA, stage one only"]


@pytest.mark.parametrize(
    "wrong", [{"checkpoint": "missing.pt"}, {"device": "quantum"}, {"checkpoint": "broken.pt"}, {"stage": "finetune"}],
    ids=["no-such-file", "no-such-device", "damaged-file", "nothing-to-start-from"],
)  # fmt: skip
def test_what_fails_before_any_result_leaves_the_directory_to_others(
    wrong: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.pt").write_text("no checkpoint")
    with pytest.raises((CheckpointError, ConfigurationError)):
        quietly(tiny(tmp_path / "out", **wrong))
    assert not list((tmp_path / "out").glob("*"))


def test_what_fails_in_a_directory_of_results_leaves_it_claimed(whole: Path) -> None:
    before = sorted(whole.rglob("*"))
    with pytest.raises(OutputDirectoryError):
        quietly(tiny(whole, villa={"steps": 3}))
    assert sorted(whole.rglob("*")) == before


@pytest.mark.slow
def test_in_a_log_lines_say_what_begins_and_ends_and_no_bar_is_drawn(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "seed-0" / "villa.json").unlink()
    run(UNITER, tiny(output, resume=True), progress=True)
    begun, done = capsys.readouterr().err.splitlines()
    assert begun == "seed 0, VILLA: started"
    assert re.fullmatch(r"seed 0, VILLA: done in 0 min \d\d s; 8 of 8 models", done)


def test_how_a_run_is_made_is_not_part_of_what_the_directory_holds(whole: Path, tmp_path: Path) -> None:
    """Else more seeds, another preset's name, or another number of processes could not take a directory up."""
    options = replace(tiny(whole), seeds=(0, 1, 2), jobs=7, threads=2, resume=True, preset="evidence", device="auto")
    assert options != tiny(whole)
    assert identity(options) == identity(tiny(whole))


def flip(path: Path) -> None:
    """Damage a file as a bad disk does: one bit, and nothing that its format would notice."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["pretrained-standard", "villa"])
def test_a_model_that_is_not_the_recorded_one_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    flip(output / "seed-0" / f"{name}.safetensors")
    trained = calls(monkeypatch, RUNNER, "fit")
    with pytest.raises(
        CheckpointError, match=rf"{name}\.safetensors' with the recorded SHA-256 .*{name}\.json' to train"
    ):
        quietly(tiny(output, resume=True))
    (output / "seed-0" / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.* SHA-256 .*, got no file; remove"):
        quietly(tiny(output, resume=True))
    assert trained() == 0


def test_a_model_that_began_from_another_stage_one_is_refused(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    weights, path = (output / "seed-0" / f"pretrained-standard.{kind}" for kind in ("safetensors", "json"))
    flip(weights)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": sha256(weights)}))
    with pytest.raises(CheckpointError, match=r"to begin from .*pretrained-standard\.safetensors' as it is, got"):
        quietly(tiny(output, resume=True))


def test_a_damaged_record_is_named(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "seed-0" / "villa.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"with a sha256 in .*villa\.json', got none; remove it to train again"):
        quietly(tiny(output, resume=True))


def test_stage_one_without_its_record_is_not_fine_tuned_from(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "seed-0" / "pretrained-standard.json").unlink()
    with pytest.raises(ConfigurationError, match="--stage pretrain"):
        quietly(tiny(output, stage="finetune", resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_record_that_is_lost_in_the_middle_of_a_run_does_not_make_it_wait_for_ever(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Lost once, stage one is trained again, to the same bits; lost each time, the run ends with an error."""
    write, lost = advvl.experiments.runner.write_json, []

    def losing(path: Path, value: object) -> None:
        write(path, value)
        if path.name == "pretrained-standard.json" and len(lost) < times:
            lost.append(path)
            path.unlink()

    monkeypatch.setattr(RUNNER, "write_json", losing)
    output = tmp_path / "out"
    if times == 1:
        quietly(tiny(output, methods=["standard"]))
        assert bits(whole)["standard"] == (output / "seed-0" / "standard.safetensors").read_bytes()
    else:
        with pytest.raises(CheckpointError, match=r"pretrained-standard\.json"):
            quietly(tiny(output, methods=["standard"]))
    assert len(lost) == times


def test_a_second_run_in_the_same_folder_is_refused(whole: Path) -> None:
    before = sorted(whole.rglob("*"))
    with (
        only_writer(whole),
        pytest.raises(OutputDirectoryError, match=r"no other process to write .*, got one at work"),
    ):
        quietly(tiny(whole, resume=True))
    assert sorted(whole.rglob("*")) == before


def test_a_checkpoint_that_does_not_fit_is_found_before_the_first_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUNNER, "work_through", lambda *_, **__: pytest.fail("workers were started"))
    given = tmp_path / "official.safetensors"
    save_checkpoint(UniterModel(UniterConfig.tiny()), given)
    with pytest.raises(CheckpointError, match=r"--checkpoint takes pretrained-\*"):
        quietly(tiny(tmp_path / "out", checkpoint=str(given), jobs=2))
    assert not list((tmp_path / "out").glob("*"))


def test_one_model_is_one_model(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = whole / "seed-0" / "pretrained-standard.safetensors"
    quietly(tiny(tmp_path / "out", checkpoint=str(given), methods=["villa"]))
    said = capsys.readouterr().out
    assert "; 1 model to train, 1 at a time" in said
    assert "; the updates of 1 model, whichever call did them" in said


def test_progress_says_how_many_of_how_many_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = claim(tmp_path, {})
    tasks = [Task(0, Row(name, update_cost=cost)) for name, cost in (("a", 1), ("b", 2), ("c", 3), ("d", 4))]
    write_json(directory / tasks[0].record, {})
    progress = replace(Progress.of(directory, tasks), began=1000.0)
    monkeypatch.setattr("time.time", lambda: 1100.0)
    assert progress.now() == "1 of 4 models"
    write_json(directory / tasks[1].record, {})  # 2 of the 9 that are left took 100 seconds
    assert progress.now() == "2 of 4 models, about 5 min 50 s left"
    for task in tasks:
        write_json(directory / task.record, {})
    assert progress.now() == "4 of 4 models"
