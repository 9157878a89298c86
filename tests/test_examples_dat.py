"""The example of DAT trains its VQ-VAE once and every method, and a second call repeats none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.examples import load_example

from advvl.experiments.cli import command
from advvl.experiments.experiment import Experiment

SMALL = [
    *("--vq_epochs", "1", "--finetune.epochs", "1", "--jobs", "1", "--evaluation.examples", "20"),
    *("--evaluation.radii", "0.5", "--evaluation.steps", "2", "--evaluation.restarts", "1"),
]


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("dat_digits")


@pytest.fixture(scope="module")
def dat(example: Any) -> Experiment[Any, Any]:
    found: Experiment[Any, Any] = example.DAT_DIGITS
    return found


@pytest.mark.slow
def test_it_runs_and_resumes(dat: Experiment[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "out"), *SMALL]
    assert command(dat, "", arguments) == 0
    first = capsys.readouterr().out
    trained = (tmp_path / "out" / "vqvae.safetensors").read_bytes()
    for row in ("standard", "PGD", "DAT"):
        assert f"\n| {row} | " in first
    assert command(dat, "", [*arguments, "--resume"]) == 0
    again = capsys.readouterr().out
    assert (tmp_path / "out" / "vqvae.safetensors").read_bytes() == trained
    assert [line for line in again.splitlines() if line.startswith("| DAT ")] == [
        line for line in first.splitlines() if line.startswith("| DAT ")
    ]


@pytest.mark.slow
def test_its_vq_vae_reconstructs_scans_that_it_has_not_seen(example: Any, tmp_path: Path) -> None:
    """After few epochs with less than two thirds of the squared error of the mean training scan."""
    options = example.Options(vq_epochs=8)
    example.prepare(options, tmp_path)
    train, test, discretise = example.data(options, tmp_path)
    seen, unseen = (part.batch(range(len(part)), torch.Generator())["pixels"] for part in (train, test))
    of_mean = (seen.mean(0) - unseen).square().mean()
    assert (discretise(unseen) - unseen).square().mean() < of_mean * 2 / 3
