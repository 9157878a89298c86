"""Runs of `advvl train` as a whole: killed and resumed, in several processes, with workers, in half precision, with logs.

All are of a pre-training of five tasks, mixed by ratio, from databases, in token buckets.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState
from support import trained
from support.spawn import Ended, Script, run
from support.task_databases import options_of, values, write_databases
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from advvl.data.mixing import MixedSource
from advvl.experiments import train_setup
from advvl.experiments.cli import main
from advvl.files import read_torch

UPDATES, KILLED = 8, 5  # the update whose second micro-batch is not made

MORE: dict[str, Any] = {
    "sampling": {"tokens": 60, "micro_batches": 2},
    "optimizer": {"updates": UPDATES, "warmup": 1},
    "checkpoint_minutes": 0.0,
    "evaluation": {"every": UPDATES},
}
SCRIPT = str(Path(trained.__file__))
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("databases")
    write_databases(options_of("pretraining", root, **MORE), root)
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values("pretraining", root, **MORE)))
    return str(path)


def arguments(config: str, out: Path, *more: str) -> list[str]:
    return ["train", config, "--output", str(out), *more]


@pytest.fixture(scope="module")
def whole(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbs, and beside it the notes of its examples."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedSource, "batch", trained.noting(MixedSource.batch, folder / "notes", -1))
        assert main(arguments(config, folder / "out")) == 0
    return folder


@pytest.fixture(scope="module")
def killed(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed within an update, in the middle of an epoch of every task."""
    folder = tmp_path_factory.mktemp("killed")
    words = (folder / "notes", 2 * KILLED + 1, *arguments(config, folder / "out"))
    status, _, complaints = Script(Path(trained.__file__), *words, folder=folder).finish()
    assert status == -9, complaints
    assert not (folder / "out" / "model.safetensors").exists()
    return folder


def in_two_processes(folder: Path, *words: str) -> Ended:
    (ended,) = run([[*TWO, str(folder / "notes"), "-1", *words]], limit=300, variables={"CUDA_VISIBLE_DEVICES": ""})
    return ended


def state(folder: Path) -> dict[str, Any]:
    found = read_torch(folder / "out" / "checkpoints" / f"update-{UPDATES:08}.pt")
    return {name: found[name] for name in ("model", "optimizer")}


def examples(folder: Path, processes: int = 1) -> list[list[list[int]]]:
    """The micro-batches of each update, whichever process did them."""
    by_process = trained.noted(folder / "notes")
    assert len(by_process) == processes
    each = 2 // processes
    updates = range(len(by_process[0]) // each)
    return [sorted(part for notes in by_process for part in notes[each * n : each * (n + 1)]) for n in updates]


@pytest.mark.slow
def test_a_killed_mixed_pretraining_resumes_to_the_same_bits(
    config: str, whole: Path, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedSource, "batch", trained.noting(MixedSource.batch, tmp_path / "again", -1))
        assert main(arguments(config, tmp_path / "out", "--resume")) == 0
    torch.testing.assert_close(state(tmp_path), state(whole), rtol=0, atol=0)
    (before,), (after,), (never,) = (
        trained.noted(one) for one in (tmp_path / "notes", tmp_path / "again", whole / "notes")
    )
    assert before == never[: 2 * KILLED + 1]
    assert after == never[2 * KILLED :]
    assert len({tuple(part) for part in never}) > 6  # an epoch has several micro-batches


@pytest.mark.slow
def test_a_killed_run_sees_the_same_examples_in_another_number_of_processes(
    config: str, whole: Path, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed / "out", tmp_path / "out")
    ended = in_two_processes(tmp_path, *arguments(config, tmp_path / "out", "--resume"))
    assert ended.code == 0, ended.output
    assert examples(tmp_path, 2) == examples(whole)[KILLED:]
    torch.testing.assert_close(state(tmp_path)["model"], state(whole)["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_do_what_one_does(config: str, whole: Path, tmp_path: Path) -> None:
    ended = in_two_processes(tmp_path, *arguments(config, tmp_path / "out"))
    assert ended.code == 0, ended.output
    assert examples(tmp_path, 2) == examples(whole)
    torch.testing.assert_close(state(tmp_path), state(whole), rtol=0, atol=0)


@pytest.mark.slow
def test_a_worker_changes_no_bit(config: str, whole: Path, tmp_path: Path) -> None:
    assert main(arguments(config, tmp_path / "out", "--workers", "1")) == 0
    torch.testing.assert_close(state(tmp_path), state(whole), rtol=0, atol=0)


@pytest.fixture
def fresh() -> Iterator[None]:
    """A process in which accelerate has no precision yet."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_half_precision_is_near_and_is_used(config: str, whole: Path, tmp_path: Path) -> None:
    assert main(arguments(config, tmp_path / "out", "--precision", "bf16")) == 0
    half, single = state(tmp_path)["model"], state(whole)["model"]
    assert all(tensor.dtype == single[name].dtype for name, tensor in half.items())
    torch.testing.assert_close(half, single, rtol=0.05, atol=5e-3)
    assert any(not tensor.equal(single[name]) for name, tensor in half.items())


@pytest.mark.usefixtures("fresh")
def test_a_second_precision_in_one_process_is_refused_in_words(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Accelerator(cpu=True, mixed_precision="no")
    assert main(arguments(config, tmp_path / "out", "--precision", "bf16")) == 2
    assert "got bf16; start another process" in capsys.readouterr().err


@pytest.mark.slow
def test_logs_are_read_back_by_tensorboard(config: str, tmp_path: Path) -> None:
    assert main(arguments(config, tmp_path / "out", "--tensorboard")) == 0
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events.parent)).Reload()
    names = set(log.Tags()["scalars"])
    assert {"loss", "learning_rate"} < names
    assert any(name.startswith("val/") for name in names)
    losses = log.Scalars("loss")
    assert [one.step for one in losses] == list(range(1, UPDATES + 1))
    assert all(0 < one.value < 100 for one in losses)
    rates = [one.value for one in log.Scalars("learning_rate")]
    assert max(rates) == pytest.approx(5e-5)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_logs_without_tensorboard_are_an_error_with_the_extra(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_setup, "find_spec", lambda name: None)
    assert main(arguments(config, tmp_path / "out", "--tensorboard")) == 2
    said = capsys.readouterr().err
    assert "tensorboard" in said
    assert "advvl[logs]" in said
    assert not (tmp_path / "out").exists()
