"""Weak scaling: an update of each of several processes, against the same processes that do not reduce their gradients.

One thread per process, gloo, one machine. `pytest benchmarks/test_processes.py --benchmark-only --full` also writes the
table of docs/scaling.md to benchmarks/results/processes.md.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from measures import Extent, extent_of
from races import Lane, Race, Races, interval, recorded
from support.spawn import results
from tables import table
from together import REGIONS, WORDS

pytestmark = pytest.mark.benchmark(timer=recorded)

STEPS, COUNTS = 3, (1, 2, 4)
LANES = ("reducing", "without communication")
PAGE = Path(__file__).parent / "results" / "processes.md"


@dataclass(frozen=True)
class Case:
    """A UNITER and the rows that each process trains it on."""

    name: str
    rows: int
    rounds: int
    config: dict[str, int] = field(default_factory=dict)
    steps: int = STEPS

    @property
    def tokens(self) -> int:
        return self.rows * (WORDS + REGIONS)


def uniter(width: int, layers: int, heads: int, *, words: int = 1000) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": words,
    }


CASES = {
    "small": Case("2 layers of width 48", 8, 25, uniter(48, 2, 4)),
    "middle": Case("4 layers of width 256", 32, 8, uniter(256, 4, 4)),
    "large": Case("6 layers of width 768", 16, 6, uniter(768, 6, 12)),
}


def chosen(extent: Extent) -> list[str]:
    return {"smoke": ["small"], "usual": ["small"], "full": list(CASES)}[extent]


class Runs:
    """What was measured, each group of processes once."""

    def __init__(self, *, smoke: bool) -> None:
        self.smoke = smoke
        self.found: dict[tuple[str, int], dict[str, Any]] = {}

    def of(self, size: str, processes: int) -> dict[str, Any]:
        if (size, processes) not in self.found:
            with tempfile.TemporaryDirectory() as name:
                case = asdict(CASES[size]) | ({"rounds": 1} if self.smoke else {})
                Path(name, "case.json").write_text(json.dumps(case))
                self.found[size, processes] = results("benchmarks.together:timed", processes, Path(name), limit=1200)[0]
        return self.found[size, processes]

    def page(self) -> str:
        """The table of docs/scaling.md."""
        lines = []
        for (size, processes), run in self.found.items():
            case, both = CASES[size], [statistics.median(run["seconds"][lane]) for lane in LANES]
            low, high = interval(run["seconds"][LANES[1]], run["seconds"][LANES[0]])
            lines.append(
                [
                    case.name,
                    f"{run['parameters'] / 1e6:.2f} M",
                    str(case.tokens),
                    str(processes),
                    *(f"{1e3 * seconds:.0f} ms" for seconds in both),
                    f"{both[1] / both[0]:.1%} [{low:.1%}, {high:.1%}]",
                ]
            )
        heads = ["model", "parameters", "tokens a process", "processes", *LANES, "efficiency"]
        return table(heads, lines)


@pytest.fixture(scope="module")
def runs(races: Races, pytestconfig: pytest.Config) -> Iterator[Runs]:
    kept = Runs(smoke=extent_of(pytestconfig) == "smoke")
    yield kept
    if kept.found:
        PAGE.parent.mkdir(exist_ok=True)
        facts = races.facts
        where = f"{facts['device']}, torch {facts['versions']['torch']}, commit {facts['commit']}"
        PAGE.write_text(f"{kept.page()}\n\n{where}\n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", chosen(extent_of(metafunc.config)))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("processes", COUNTS)
def test_update(race: Race, runs: Runs, size: str, processes: int, lane: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("gloo processes on a CPU; on GPUs, measure a run of your own")
    run, case = runs.of(size, processes), CASES[size]
    seconds = run["seconds"]
    ours = lane == "reducing"
    over = {LANES[1]: interval(seconds[lane], seconds[LANES[1]])} if ours else {}
    facts = {
        "role": "ours" if ours else "limit",
        "loops": 1,
        "over": over,
        "dtype": "float32",
        "shape": f"{case.name}, {run['parameters']} parameters, {case.rows} rows of {WORDS} words and {REGIONS} regions, "
        f"K={STEPS}, {processes} processes of one thread",
        "processes": processes,
        "efficiency": statistics.median(seconds[LANES[1]]) / statistics.median(seconds["reducing"]),
    }
    title = f"{case.name}, {case.tokens} tokens a process, {processes} processes"
    race.report("processes", title, lane, Lane(seconds[lane], races_facts(race) | facts))


def races_facts(race: Race) -> dict[str, Any]:
    return dict(race.races.facts) | {"threads": 1}
