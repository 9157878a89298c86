"""`benchmarks/against.py`: two checkouts in one interleaved run, and what it says of their times."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from against import Times, measure, page, ratios

pytestmark = pytest.mark.slow  # several processes

ROOT = Path(__file__).parents[2]


def drawn(factor: float, *, rounds: int = 25, noise: float = 0.02) -> Times:
    """Two cases, of which the first takes `factor` times as long as before."""
    draw = random.Random(0)

    def seconds(mean: float) -> list[float]:
        return [mean * draw.gauss(1, noise) for _ in range(rounds)]

    return Times(ours={"a": seconds(factor), "b": seconds(0.1)}, base={"a": seconds(1.0), "b": seconds(0.1)})


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_the_ratio_and_the_geometric_mean_are_told_with_intervals_that_hold_them(factor: float) -> None:
    cases, mean = ratios(drawn(factor))
    assert cases["a"].low <= factor <= cases["a"].high
    assert mean.low <= factor**0.5 <= mean.high
    assert mean.high - mean.low < 0.05


def test_the_page_names_a_case_that_computes_something_else() -> None:
    times = drawn(1.0)
    times.differ["b"] = 0.25
    lines = page(times, *ratios(times)).splitlines()
    assert next(line for line in lines if line.startswith("| b ")).endswith("**off by 2.5e-01** |")
    assert "geometric mean of the ratios: 1.0" in lines[-1]


def test_this_checkout_against_itself_computes_the_same() -> None:
    times = measure(ROOT, ROOT, sizes=["small"], rounds=2, processes=1)
    assert not times.differ
    assert times.ours.keys() == times.base.keys()
    assert {len(rounds) for side in (times.ours, times.base) for rounds in side.values()} == {2}


def test_a_checkout_that_computes_something_else_is_reported(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "advvl", tmp_path / "advvl")
    recipe = tmp_path / "advvl/recipes/villa.py"
    recipe.write_text(recipe.read_text().replace("kl_weight: float = 1.5", "kl_weight: float = 3.0"))
    command = [sys.executable, str(ROOT / "benchmarks/against.py"), "--base", str(tmp_path), "--rounds", "2"]
    done = subprocess.run([*command, "--processes", "1", "--sizes", "small"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    off = [line.split(" | ")[0] for line in done.stdout.splitlines() if "off by" in line]
    assert off == ["| VILLA, together, small", "| VILLA, in turn, small", "| VILLA, shared masks, small"]
