"""Several ways to do one thing, timed round by round in an order drawn each time: by events on a GPU, else by the clock."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Calls = Mapping[str, Callable[[], object]]
REPEATS = 20  # calls in one CUDA graph


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Arguments:
        budget: seconds for all rounds together, which the least number of rounds may exceed.
        least, most: rounds.
        shortest: seconds that a timed stretch lasts at least; shorter calls are made several times in a row; 0: one call.
    """

    budget: float = 1.0
    least: int = 5
    most: int = 40
    shortest: float = 2e-3


def race(calls: Calls, device: torch.device, pace: Pace) -> dict[str, list[float]]:
    """Seconds of one call, for every round of each way; all have been called before."""
    warm = {name: seconds(call, device, 1) for name, call in calls.items()}
    if pace.shortest:
        warm = {name: min(took, seconds(calls[name], device, 1)) for name, took in warm.items()}
    loops = {name: max(1, math.ceil(pace.shortest / max(took, 1e-9))) for name, took in warm.items()}
    total = sum(warm[name] * loops[name] for name in calls)
    found: dict[str, list[float]] = {name: [] for name in calls}
    draw = random.Random(0)
    for _ in range(min(pace.most, max(pace.least, round(pace.budget / max(total, 1e-9))))):
        for name in draw.sample(list(calls), len(calls)):
            found[name].append(seconds(calls[name], device, loops[name]) / loops[name])
    return found


def seconds(call: Callable[[], object], device: torch.device, loops: int) -> float:
    """How long `loops` calls in a row take on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(loops):
            call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(loops):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def host_seconds(call: Callable[[], object], device: torch.device, loops: int) -> float:
    """How long the host takes for a call that it does not wait for; no more calls than the device's queue holds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(loops):
        call()
    took = (time.perf_counter() - start) / loops
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return took


def repeated(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], int]:
    """The call without its host's share: on a GPU a CUDA graph of several of them, and how many."""
    if device.type != "cuda":
        return call, 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    return graph.replay, REPEATS


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, mid, high
