"""The example of DAT trains its VQ-VAE once and every method, and a second call repeats none of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from advvl.experiments.cli import command
from advvl.experiments.experiment import Experiment

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "dat_digits.py"
SMALL = [
    *("--vq_epochs", "1", "--finetune.epochs", "1", "--jobs", "1", "--evaluation.examples", "20"),
    *("--evaluation.radii", "0.5", "--evaluation.steps", "2", "--evaluation.restarts", "1"),
]


@pytest.fixture(scope="module")
def dat() -> Experiment[Any, Any]:
    spec = importlib.util.spec_from_file_location("dat_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"dat_digits": module}):  # its dataclass looks itself up
        spec.loader.exec_module(module)
    found: Experiment[Any, Any] = module.DAT_DIGITS
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
