"""The example of DAT trains its VQ-VAE once and every method, and a second call repeats none of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "dat_digits.py"
SMALL = [
    *("--vq_epochs", "1", "--finetune.epochs", "1", "--jobs", "1", "--evaluation.examples", "20"),
    *("--evaluation.radii", "0.5", "--evaluation.steps", "2", "--evaluation.restarts", "1"),
]


def call(output: Path, *more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, str(EXAMPLE), "--output", str(output), *SMALL, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path: Path) -> None:
    first = call(tmp_path / "out")
    trained = (tmp_path / "out" / "vqvae.safetensors").read_bytes()
    for row in ("standard", "PGD", "DAT"):
        assert f"\n| {row} | " in first
    again = call(tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "vqvae.safetensors").read_bytes() == trained
    assert [line for line in again.splitlines() if line.startswith("| DAT ")] == [
        line for line in first.splitlines() if line.startswith("| DAT ")
    ]
