"""Steps and attacks by this checkout against another one of this repository, in one interleaved run.

    python benchmarks/against.py --base DIR [--rounds 21] [--processes 3] [--sizes small medium] [--clock cpu] [--out FILE]

Each side runs in a process of its own; in every round all cases are timed, in an order drawn each time, by both sides one
after the other, which of them first being drawn too. The processes are started again several times, since the place of
their memory is luck as well. Printed are the ratio of the medians of each case and the geometric mean of all, with 95 % of
them over rounds drawn with replacement, and whether both sides compute the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHORTEST = 0.05  # seconds of a timed stretch
CLOSE = 1e-4  # of the sum of squares of all gradients, in fp32
DRAWS = 2000


class Side:
    """The process that times one checkout."""

    def __init__(self, root: Path, sizes: Sequence[str], clock: str) -> None:
        command = [sys.executable, str(HERE / "against_cases.py"), str(root), clock, *sizes]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            command, env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        said = self._answer()
        self.results: dict[str, float] = said["results"]
        self.warm: dict[str, float] = said["warm"]

    def seconds(self, case: str, loops: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([case, loops]) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        with self.process:  # closes its pipes, at which it ends
            pass

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with {self.process.wait()}; what it said is above")
        return json.loads(line)


@dataclass
class Times:
    """Seconds of every round of each case: of this checkout and of the base, and the cases that differ."""

    ours: dict[str, list[float]] = field(default_factory=dict)
    base: dict[str, list[float]] = field(default_factory=dict)
    differ: dict[str, float] = field(default_factory=dict)


def measure(ours: Path, base: Path, *, sizes: Sequence[str], rounds: int, processes: int, clock: str = "wall") -> Times:
    times, draw = Times(), random.Random(0)
    for process in range(processes):
        sides = {"ours": Side(ours, sizes, clock), "base": Side(base, sizes, clock)}
        try:
            names = list(sides["ours"].results)
            for name in names:
                times.ours.setdefault(name, [])
                times.base.setdefault(name, [])
                off = abs(sides["ours"].results[name] / sides["base"].results[name] - 1)
                if not off <= CLOSE:
                    times.differ[name] = off
            loops = {name: max(1, math.ceil(SHORTEST / sides["base"].warm[name])) for name in names}
            for _ in range(rounds * (process + 1) // processes - rounds * process // processes):
                for name in draw.sample(names, len(names)):
                    for side in draw.sample(("ours", "base"), 2):
                        getattr(times, side)[name].append(sides[side].seconds(name, loops[name]))
        finally:
            for each in sides.values():
                each.close()
    return times


@dataclass(frozen=True)
class Ratio:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratios(times: Times, draws: int = DRAWS) -> tuple[dict[str, Ratio], Ratio]:
    """Of the medians of each case, and their geometric mean; rounds are drawn whole, with all of their cases."""
    rounds = len(next(iter(times.ours.values())))
    draw = random.Random(0)
    picks = [range(rounds), *([draw.randrange(rounds) for _ in range(rounds)] for _ in range(draws))]
    logs = {name: [_log(times.ours[name], times.base[name], pick) for pick in picks] for name in times.ours}
    means = [statistics.fmean(values) for values in zip(*logs.values(), strict=True)]
    return {name: _ratio(values) for name, values in logs.items()}, _ratio(means)


def _log(ours: Sequence[float], base: Sequence[float], pick: Sequence[int]) -> float:
    return math.log(statistics.median(ours[i] for i in pick) / statistics.median(base[i] for i in pick))


def _ratio(logs: Sequence[float]) -> Ratio:
    """The first is that of all rounds."""
    ordered = sorted(logs[1:])
    edge = len(ordered) // 40
    return Ratio(*(math.exp(value) for value in (logs[0], ordered[edge], ordered[-1 - edge])))


def page(times: Times, cases: Mapping[str, Ratio], mean: Ratio) -> str:
    lines = ["| case | base | ours | ours over base | computes |", "| --- | ---: | ---: | ---: | --- |"]
    for name, ratio in cases.items():
        base, ours = (1e3 * statistics.median(side[name]) for side in (times.base, times.ours))
        same = f"**off by {times.differ[name]:.1e}**" if name in times.differ else "the same"
        lines.append(f"| {name} | {base:.2f} ms | {ours:.2f} ms | {ratio} | {same} |")
    rounds = len(next(iter(times.ours.values())))
    return "\n".join([*lines, "", f"geometric mean of the ratios: {mean}, over {rounds} rounds"])


def main() -> int:
    """0 if both sides compute the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--processes", type=int, default=3, help="how often both sides are started")
    parser.add_argument("--sizes", nargs="+", choices=("small", "medium"), default=("small", "medium"))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others share the machine")
    parser.add_argument("--out", type=Path, help="the seconds of every round, as JSON")
    given = parser.parse_args()
    options = {name: getattr(given, name) for name in ("sizes", "rounds", "processes", "clock")}
    times = measure(HERE.parent, given.base.resolve(), **options)
    cases, mean = ratios(times)
    print(page(times, cases, mean))
    if given.out:
        given.out.write_text(
            json.dumps({"ours": times.ours, "base": times.base, "differ": times.differ}, indent=1) + "\n"
        )
    return 1 if times.differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
