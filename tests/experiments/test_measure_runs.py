"""Runs of `advvl evaluate --attack` as a whole, in two processes and killed, against one that nothing disturbs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import measured as script
from support.measured_models import SHORT, checkpoints, configured, measured, same
from support.spawn import Ended, run

from advvl.experiments.cli import main

pytestmark = pytest.mark.slow  # several processes

SCRIPT = str(Path(script.__file__))
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
ASKED = ["--attack", "pgd,random", "--radius", "image=L2:1,20", "--evaluation.tokens", "30"]
MODELS = ("seed0-best", "seed1-best")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The databases and models, and the evaluation of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    configured("vqa", folder)
    assert main(words(folder, folder / "out")) == 0
    return folder


def words(root: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", str(root / "vqa.yaml"), *ASKED, *SHORT, *checkpoints(root), "--output", str(out), *more]


def in_two_processes(notes: Path, last: int, *words: str) -> Ended:
    (ended,) = run([[*TWO, str(notes), str(last), *words]], limit=300, variables={"CUDA_VISIBLE_DEVICES": ""})
    return ended


def check_same(found: Path, root: Path) -> None:
    for name in MODELS:
        assert same(measured(found, name), measured(root, name))
    report, whole = (folder / "out" / "robustness" / "report.csv" for folder in (found, root))
    assert report.read_text() == whole.read_text()
    assert not (found / "out" / "robustness" / "batches").exists()


def test_two_processes_share_the_batches_and_find_what_one_does(root: Path, tmp_path: Path) -> None:
    ended = in_two_processes(tmp_path / "notes", -1, *words(root, tmp_path / "out"))
    assert ended.code == 0, ended.output
    check_same(tmp_path, root)
    for parity, made in enumerate(script.batches(tmp_path / "notes")):
        one_model = made[: len(made) // 2]
        assert made == 2 * one_model
        assert one_model == list(range(parity, max(made) + 1, 2))


def test_a_shared_evaluation_that_was_killed_goes_on_in_any_number_of_processes(root: Path, tmp_path: Path) -> None:
    killed = in_two_processes(tmp_path / "notes", 1, *words(root, tmp_path / "out"))
    assert killed.code == 1, killed.output
    kept = {int(path.stem) for path in (tmp_path / "out" / "robustness" / "batches").rglob("*.safetensors")}
    assert 1 in kept
    assert 3 not in kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.worst_case, "_record", script.worst_case._record)
        script.note(tmp_path / "again", -1)
        assert main(words(root, tmp_path / "out", "--resume")) == 0
    check_same(tmp_path, root)
    (again,) = script.batches(tmp_path / "again")
    first = again[: -(max(again) + 1)]
    assert sorted([*first, *kept]) == list(range(max(again) + 1))
