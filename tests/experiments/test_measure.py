"""`advvl evaluate --attack` and `advvl report`, by their command lines, on small databases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.measured_models import ASKED, SHORT, checkpoints, configured, measured, same
from support.measurements import measurement
from support.task_databases import values, write_databases

import advvl
from advvl import L2, Linf
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation import measurement as measurements
from advvl.evaluation import worst_case as engine
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.worst_case import worst_case
from advvl.experiments.cli import main
from advvl.experiments.config import Layer, build
from advvl.experiments.measure_examples import AttackedExamples
from advvl.experiments.measure_options import ATTACKS, EvaluateOptions, budgets_of
from advvl.experiments.records import sha256
from advvl.experiments.report_tool import named
from advvl.experiments.train_setup import model_of
from advvl.maximizers.random_search import RandomSearch


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2", "vcr", "retrieval", "referring"])
def test_models_are_measured_and_shown_on_one_page(task: str, tmp_path: Path, capsys: Any) -> None:
    config = configured(task, tmp_path)
    assert main(["evaluate", config, *ASKED, *SHORT, *checkpoints(tmp_path)]) == 0
    folder = tmp_path / "out" / "robustness"
    assert str(folder / "report.html") in capsys.readouterr().out
    found = measured(tmp_path, "seed0-best")
    assert len(found.clean) == 12
    assert found.budgets == (
        {"image": L2(1.0)}, {"image": L2(20.0)},
        {"image": L2(1.0), "text": Linf(0.2, per="token")}, {"image": L2(20.0), "text": Linf(2.0, per="token")},
    )  # fmt: skip
    assert found.attacks == ("pgd", "random")
    assert found.about["task"] == task
    said = json.loads((folder / "report.json").read_text())
    assert list(said["models"]) == ["seed0/best", "seed1/best"]
    assert said["models"]["seed0/best"]["accuracy"][0]["accuracy"] == float(found.clean.mean())
    assert (
        said["models"]["seed0/best"]["accuracy"][4]["accuracy"]
        < said["models"]["seed0/best"]["accuracy"][0]["accuracy"]
    )
    assert (said["chance"] is None) is (task in ("retrieval", "referring"))
    assert said["chance"] == found.about["chance"]
    assert found.about["versions"]["advvl"] == advvl.__version__
    if task == "nlvr2":  # two rows for each example
        assert found.about["checks"]["coupled examples"] == found.about["checks"]["unlimited attack fails"] == "made"
    page = (folder / "report.html").read_text()
    assert "<figure>" in page
    assert "[CLS]" in page
    assert not (folder / "batches").exists()


HEADLINES = {"vqa": "accuracy", "ve": "accuracy", "nlvr2": "accuracy", "vcr": "both", "referring": "accuracy"}


@pytest.mark.slow
@pytest.mark.parametrize("task", HEADLINES)
def test_the_clean_accuracy_beside_attacks_is_that_of_the_task(task: str, tmp_path: Path) -> None:
    config, first = configured(task, tmp_path), str(tmp_path / "seed0" / "best.safetensors")
    assert main(["evaluate", config, "--checkpoint", first]) == 0
    scores = json.loads((tmp_path / "out" / "scores-val.json").read_text())
    command = ["--attack", "random", "--radius", "image=L2:1", "--checkpoint", first, "--robustness.steps", "1"]
    assert main(["evaluate", config, *command]) == 0
    assert float(measured(tmp_path, "best").clean.mean()) == pytest.approx(scores[HEADLINES[task]], abs=1e-12)


@pytest.mark.slow
def test_retrieval_is_right_where_the_match_is_the_best_of_its_group(tmp_path: Path) -> None:
    options = build(
        EvaluateOptions, Layer("the test", values("retrieval", tmp_path, seed=0, sampling={"negatives": 2}))
    )
    write_databases(options, tmp_path)
    model = model_of(options).double().eval()
    examples = AttackedExamples.of(options)
    assert examples.task.least == 5
    target = examples.task.adapter(model)
    scores = []
    for rows, batch in zip(examples.pieces, examples.batches(torch.device("cpu")), strict=True):
        batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        found = worst_case(
            target, [batch], {"image": L2(1.0)}, attacks=RANDOM, targets=examples.task.targets, checks=False
        )
        fields = {name: value for name, value in batch.items() if name in model.fields - {"sample_size"}}
        best = model(**fields).logits.view(len(rows), 5).argmax(1)
        assert found.clean.tolist() == (best == 0).double().tolist()
        scores += found.clean.tolist()
    assert 0 < sum(scores) < len(scores) == 12


RANDOM = [NamedAttack(name="random", maximizer=RandomSearch(1))]


@pytest.mark.slow
def test_all_attacks_are_made_by_their_names(tmp_path: Path) -> None:
    config, files = configured("vqa", tmp_path), checkpoints(tmp_path)[1].split(",")
    command = ["--attack", ",".join(reversed(ATTACKS)), "--radius", "image=L2:1,9", "--surrogate", files[1]]
    assert main(["evaluate", config, *command, *SHORT, "--checkpoint", files[0]]) == 0
    found = measured(tmp_path, "best")
    assert found.attacks == ATTACKS
    assert found.about["surrogate"] == sha256(Path(files[1]))
    assert found.about["checks"]["transfer attack beats gradients"] == "made"
    said = dict(zip(ATTACKS, found.about["attacks"], strict=True))
    for name, part in (
        ("auto-pgd-dlr", "objective=advvl.evaluation.objectives.dlr"),
        ("fmn", "MinimumNorm(steps=3)"),
        ("transfer", "surrogate=Adapter(UniterForVQA, "),
    ):
        assert part in said[name]
    assert all("surrogate=None" in text for name, text in said.items() if name != "transfer")


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_bits_of_one_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = configured("vqa", tmp_path)
    command = ["evaluate", config, *ASKED, *SHORT, *checkpoints(tmp_path)]
    assert main(command) == 0
    whole = {name: measured(tmp_path, name) for name in ("seed0-best", "seed1-best")}
    page = (tmp_path / "out" / "robustness" / "report.csv").read_text()
    shutil.rmtree(tmp_path / "out" / "robustness")
    done: list[int] = []
    record = engine._record

    def killed(plan: Any, number: int, *rest: Any, **more: Any) -> Any:
        done.append(number)
        if len(done) == 3:
            raise KeyboardInterrupt
        return record(plan, number, *rest, **more)

    monkeypatch.setattr(engine, "_record", killed)
    assert main(command) == 130
    folder = tmp_path / "out" / "robustness" / "batches" / "seed0" / "best"
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["0.safetensors", "1.safetensors"]
    spent = [float(load_file(folder / name)["seconds"].sum()) for name in kept]
    assert min(spent) > 0
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    damaged = folder / "1.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-3])
    assert main([*command, "--resume"]) == 2
    assert "expected the record of a batch in" in capsys.readouterr().err
    damaged.write_bytes(content)
    done[:] = [0, 0, 0]  # no further kill
    assert main([*command, "--resume"]) == 0
    batches = 1 + max(done)
    assert len(done) == 3 + 2 * batches - 2  # two of the first model's were kept
    for name, found in whole.items():
        assert same(measured(tmp_path, name), found)
    assert measured(tmp_path, "seed0-best").about["seconds"] > sum(spent)
    assert (tmp_path / "out" / "robustness" / "report.csv").read_text() == page


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
def test_a_resumed_evaluation_attacks_no_batch_twice(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = configured("vqa", tmp_path)
    command = ["evaluate", config, "--attack", "random", "--radius", "image=L2:1", *SHORT, *checkpoints(tmp_path)]
    done: list[int] = []
    record, stop = engine._record, [0]

    def killed(plan: Any, number: int, *rest: Any, **more: Any) -> Any:
        if len(done) == stop[0]:
            raise KeyboardInterrupt
        done.append(number)
        return record(plan, number, *rest, **more)

    monkeypatch.setattr(engine, "_record", killed)
    stop[0] = -1
    assert main(command) == 0
    batches = len(done) // 2
    assert batches > 2
    shutil.rmtree(tmp_path / "out" / "robustness")
    done.clear()
    for begun in range(2):  # killed twice, each time after one batch more
        stop[0] = place * batches + 1 + begun
        assert main([*command, "--resume"] if begun else command) == 130
    stop[0] = -1
    assert main([*command, "--resume"]) == 0
    assert done == 2 * list(range(batches))


@pytest.mark.slow
def test_results_are_not_lost_nor_mixed_with_those_of_other_weights_or_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = configured("vqa", tmp_path)
    first = str(tmp_path / "seed0" / "best.safetensors")
    command = ["evaluate", config, "--attack", "random", "--radius", "image=L2:1", "--checkpoint", first, *SHORT]
    assert main(command) == 0
    assert main(command) == 2
    assert "expected no results" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(measurements, "__version__", "0.0.1")
        assert main([*command, "--resume"]) == 2
    assert "versions.advvl" in capsys.readouterr().err
    shutil.copy(tmp_path / "seed1" / "best.safetensors", first)
    assert main([*command, "--resume"]) == 2
    assert "weights" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.slow
def test_results_are_not_those_of_other_data_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = configured("vqa", tmp_path)
    first = str(tmp_path / "seed0" / "best.safetensors")
    command = ["evaluate", config, "--attack", "random", "--radius", "image=L2:1", "--checkpoint", first, *SHORT]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
    made = AttackedExamples._batch

    def brighter(self: AttackedExamples, rows: Sequence[int]) -> dict[str, Any]:
        batch = made(self, rows)
        return {**batch, "img_feat": batch["img_feat"] + 1}

    monkeypatch.setattr(AttackedExamples, "_batch", brighter)
    assert main([*command, "--resume"]) == 2
    assert "examples" in capsys.readouterr().err


def test_checkpoints_of_another_task_are_refused_before_any_attack(tmp_path: Path, capsys: Any) -> None:
    config = configured("vqa", tmp_path)
    other = tmp_path / "other"
    configured("nlvr2", other)
    files = f"{tmp_path / 'seed0' / 'best.safetensors'},{other / 'seed0' / 'best.safetensors'}"
    assert main(["evaluate", config, *ASKED, "--checkpoints", files]) == 2
    assert str(other) in capsys.readouterr().err
    assert not (tmp_path / "out" / "robustness").exists()


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("vqa", ["--checkpoints", "none.safetensors"], "a file of weights at 'none.safetensors', got none"),
        ("vqa", [], "best.safetensors', got none"),
        ("pretraining", [], "to attack, got pretraining, which has no answers to choose from"),
        ("vqa", ["--attack", "transfer"], "expected a surrogate with the attack transfer"),
        ("vqa", ["--surrogate", "other.safetensors"], "expected a surrogate with the attack transfer"),
    ],
)
def test_what_cannot_be_attacked_is_refused(task: str, more: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "task.yaml"
    mixture = {"mlm": [1]} if task == "pretraining" else {}
    given = {"task": task, "output": str(tmp_path / "out"), "sampling": {"tokens": 100}, "mixture": mixture}
    path.write_text(yaml.safe_dump(given))
    assert main(["evaluate", str(path), *ASKED, *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        (
            "nlvr2",
            ["--attack", "auto-pgd-dlr"],
            "expected three answers or more of each example for auto-pgd-dlr, got 2",
        ),
        ("vqa", ["--attack", "transfer", "--surrogate", "none.safetensors"], "weights at 'none.safetensors', got none"),
    ],
)
def test_an_attack_that_a_task_or_a_file_does_not_allow_is_refused_before_any(
    task: str, more: list[str], said: str, tmp_path: Path, capsys: Any
) -> None:
    config = configured(task, tmp_path)
    assert main(["evaluate", config, *ASKED, *checkpoints(tmp_path), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "robustness").exists()


def test_the_same_weights_twice_are_refused(tmp_path: Path, capsys: Any) -> None:
    config = configured("vqa", tmp_path)
    file = tmp_path / "seed0" / "best.safetensors"
    assert main(["evaluate", config, *ASKED, "--checkpoints", f"{file},{file}"]) == 2
    assert "expected different files of weights" in capsys.readouterr().err


def test_radii_are_read_with_their_norm_alone_or_jointly() -> None:
    assert budgets_of("image=L2:0.5,1") == [{"image": L2(0.5)}, {"image": L2(1.0)}]
    assert budgets_of("text=Linf/token:1e-2") == [{"text": Linf(0.01, per="token")}]
    assert budgets_of("image=L2:1,2+text=L2:3,4") == [
        {"image": L2(1.0), "text": L2(3.0)},
        {"image": L2(2.0), "text": L2(4.0)},
    ]


def asked(**robustness: Any) -> EvaluateOptions:
    return build(EvaluateOptions, Layer("the test", {"sampling": {"tokens": 9}, "robustness": robustness}))


@pytest.mark.parametrize(
    "radius",
    ["image=L3:1", "image=L2:", "image=L2:2,1", "image=L2:0", "image:1", "image=L2:1,2+text=L2:1", "image=L2:1e400"],
)
def test_radii_of_another_form_are_refused(radius: str) -> None:
    with pytest.raises(ConfigurationError, match="MODALITY=NORM:R1,R2"):
        asked(attack=["pgd"], radius=[radius])


@pytest.mark.parametrize(
    ("robustness", "said"),
    [
        ({"attack": ["pgd"]}, "expected attacks and radii"),
        ({"radius": ["image=L2:1"]}, "expected attacks and radii"),
        ({"attack": ["gpd"], "radius": ["image=L2:1"]}, "expected attacks of pgd, .*got gpd"),
        ({"attack": ["pgd", "pgd"], "radius": ["image=L2:1"]}, "each once"),
        ({"checkpoints": ["a"]}, "expected an attack beside checkpoints"),
        ({"attack": ["pgd"], "radius": ["image=L2:1"], "examples": 0}, "examples"),
    ],
)
def test_options_that_measure_nothing_are_refused(robustness: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        asked(**robustness)


def test_a_report_is_made_of_files_and_folders(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run" / "measurements").mkdir(parents=True)
    for name in ("one", "two"):
        measurement().save(tmp_path / "run" / "measurements" / f"{name}.safetensors")
    file = measurement([{}, {}, {}]).save(tmp_path / "b.safetensors")
    command = ["report", str(tmp_path / "run"), f"third={file}", "--output", str(tmp_path / "page"), "--chance", "0.25"]
    assert main(command) == 0
    said = json.loads((tmp_path / "page" / "report.json").read_text())
    assert list(said["models"]) == ["one", "two", "third"]
    assert said["chance"] == 0.25
    assert main(command) == 2
    assert "expected no report" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_name_before_a_folder_is_of_all_its_files(tmp_path: Path) -> None:
    for run, files in (("a", ("plain", "villa")), ("b", ("plain", "villa")), ("c", ("best",))):
        (tmp_path / run / "measurements").mkdir(parents=True)
        for name in files:
            measurement().save(tmp_path / run / "measurements" / f"{name}.safetensors")
    given = [f"ours={tmp_path / 'a'}", f"theirs={tmp_path / 'b'}", f"old={tmp_path / 'c'}", str(tmp_path / "a")]
    assert list(named(given)) == ["ours/plain", "ours/villa", "theirs/plain", "theirs/villa", "old", "plain", "villa"]
    with pytest.raises(DataError, match=r"expected a measurement or results.json at '=.*', got none"):
        named([f"={tmp_path / 'c'}"])


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["none.safetensors"], "expected a measurement or results.json at 'none.safetensors', got none"),
        (["a.safetensors"], "different names, got 'a' twice"),
        (["examples=c.safetensors"], "same number of examples"),
        (["data=d.safetensors"], "same data"),
        (["text.md"], "expected a measurement in 'text.md'"),
    ],
)
def test_a_report_of_what_does_not_go_together_is_refused(
    others: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measurement().save("a.safetensors")
    measurement(examples=11).save("c.safetensors")
    measurement(about={"data": 2}).save("d.safetensors")
    Path("text.md").write_text("no measurement")
    assert main(["report", "a.safetensors", *others, "--output", "page"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("page").exists()


def test_a_report_takes_the_results_of_experiments(tmp_path: Path, capsys: Any) -> None:
    evidence = Path(__file__).parents[2] / "docs" / "evidence"
    file = measurement().save(tmp_path / "plain.safetensors")
    command = ["report", str(file), str(evidence / "colors"), "--output", str(tmp_path / "page")]
    assert main(command) == 0
    said = json.loads((tmp_path / "page" / "report.json").read_text())
    assert (list(said["models"]), list(said["experiments"])) == (["plain"], ["colors"])
    assert main(["report", str(evidence), str(evidence / "colors"), "--output", str(tmp_path / "both")]) == 2
    assert "got data.seed 0 of 'evidence' and none of 'colors'" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()
