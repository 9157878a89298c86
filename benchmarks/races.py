"""Several ways to do one thing, timed round by round, so that a bad second of the machine falls on all of them.

A benchmark is one lane of a race. The first one asked for runs the whole race; each then hands the durations of its lane
to pytest-benchmark, through a clock that is moved by them, so that its tables and its JSON hold what was measured.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture  # type: ignore[import-untyped]

Build = Callable[[], Mapping[str, Callable[[], "Entry"]]]
Role = Literal["ours", "peer", "limit"]


@dataclass(frozen=True)
class Entry:
    """One lane, ready to run.

    Arguments:
        call: what is timed, once a round or several times in a row; it has been called before, and is once more to
            warm up.
        check: asserts on what the calls have left, after the last round.
        role: ours, what it is compared with, or what nothing can be faster than.
        facts: for `extra_info`.
        repeats: how often `call` does the work.
    """

    call: Callable[[], object]
    check: Callable[[], object]
    role: Role
    facts: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 1


@dataclass
class Lane:
    """What came of an entry: the seconds of each round, or why there are none."""

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failure: BaseException | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Pace:
    """How long a race may take.

    Arguments:
        budget: seconds for all rounds together, which the least number of rounds may exceed.
        least, most: rounds.
        shortest: seconds that a timed stretch must last; a shorter call is made several times in a row.
    """

    budget: float = 4.0
    least: int = 5
    most: int = 40
    shortest: float = 2e-4


_now = 0.0


def recorded() -> float:
    """The clock that pytest-benchmark reads: it stands still but for the durations that are played to it."""
    return _now


def _played(seconds: list[float]) -> Callable[[], None]:
    durations: Iterator[float] = iter(seconds)

    def advance() -> None:
        global _now
        _now += next(durations)

    return advance


class Races:
    """The races of a session, each run once."""

    def __init__(self, device: torch.device, facts: Mapping[str, Any], *, smoke: bool = False) -> None:
        self.device, self.facts, self.smoke = device, facts, smoke
        self._run: dict[str, dict[str, Lane]] = {}

    def of(self, title: str, build: Build, pace: Pace) -> dict[str, Lane]:
        """The lanes of the race of this title."""
        if title not in self._run:
            self._run[title] = self._race(build, pace)
        return self._run[title]

    def _race(self, build: Build, pace: Pace) -> dict[str, Lane]:
        makers = build()
        lanes = {name: Lane() for name in makers}
        entries: dict[str, Entry] = {}
        for name, make in makers.items():
            try:
                entries[name] = make()
            except (Exception, pytest.skip.Exception) as failure:  # kept for the benchmark of this lane
                lanes[name].failure = failure
        warm = {name: self._seconds(entry, 1) for name, entry in entries.items()}
        if self.smoke:
            pace = Pace(budget=0.0, least=1, most=1, shortest=0.0)
        loops = {name: max(1, math.ceil(pace.shortest / seconds)) for name, seconds in warm.items()}
        total = sum(warm[name] * loops[name] for name in entries)
        rounds = min(pace.most, max(pace.least, round(pace.budget / total))) if entries else 0
        draw = random.Random(0)
        for _ in range(rounds):
            for name in draw.sample(list(entries), len(entries)):  # so that none always follows the same one
                entry, lane = entries[name], lanes[name]
                ballast = [torch.empty(draw.randrange(2**14, 2**21), dtype=torch.uint8) for _ in range(20)]
                del ballast[::2]  # memory lies otherwise each time: that decides how often pages are asked for anew
                lane.seconds.append(self._seconds(entry, loops[name]) / (loops[name] * entry.repeats))
        for name, entry in entries.items():
            others = [other for other in entries if entry.role == "ours" and entries[other].role != "ours"]
            over = {other: interval(lanes[name].seconds, lanes[other].seconds) for other in others}
            lanes[name].facts = (
                {"role": entry.role, "loops": loops[name], "over": over} | self.facts | dict(entry.facts)
            )
            try:
                entry.check()
            except Exception as failure:
                lanes[name].failure = failure
        return lanes

    def _seconds(self, entry: Entry, loops: int) -> float:
        """How long `loops` calls take, until the device has done them."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.synchronise()
            start = time.perf_counter()
            for _ in range(loops):
                entry.call()
            self.synchronise()
            return time.perf_counter() - start
        finally:
            if collecting:
                gc.enable()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interval(ours: list[float], theirs: list[float], *, draws: int = 2000) -> tuple[float, float]:
    """95 % of the ratio of medians, over rounds drawn anew, each with both of its times."""
    drawn = torch.randint(len(ours), (draws, len(ours)), generator=torch.Generator().manual_seed(0))
    medians = [torch.tensor(seconds, dtype=torch.float64)[drawn].quantile(0.5, dim=1) for seconds in (ours, theirs)]
    low, high = (medians[0] / medians[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(f"{low:.4g}"), float(f"{high:.4g}")


@dataclass(frozen=True)
class Race:
    """The fixture: runs one lane of a race as the benchmark of the test."""

    races: Races
    benchmark: BenchmarkFixture

    def __call__(self, suite: str, title: str, name: str, build: Build, pace: Pace | None = None) -> Lane:
        """Report the lane `name` of the race `title`; its skip or failure is that of the test."""
        lane = self.races.of(f"{suite}: {title}", build, pace or Pace())[name]
        if lane.failure is not None:
            raise lane.failure
        self.report(suite, title, name, lane)
        return lane

    def report(self, suite: str, title: str, name: str, lane: Lane) -> None:
        self.benchmark.group = title
        self.benchmark.extra_info |= {"suite": suite, "case": title, "provider": name, **lane.facts}
        self.benchmark.pedantic(_played(lane.seconds), rounds=len(lane.seconds))
        if self.benchmark.enabled:
            assert math.isclose(self.benchmark.stats.stats.median, lane.median, rel_tol=1e-6, abs_tol=1e-9), (
                "expected the clock of races; mark the module with pytest.mark.benchmark(timer=recorded)"
            )
