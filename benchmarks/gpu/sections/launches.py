"""Kernels and host time of one move and of one VILLA step, on tensors so small that the host is what one waits for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from measures import launches
from test_step import Bench, Case
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.sections.moves import Tensors
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace, host_seconds, quartiles

MOVE, SMOKE_MOVE = (64, 20 * 768), (2, 33)
CALLS, ROUNDS = 200, 9  # fewer calls in a row than the device's queue holds


def run(setting: Setting) -> None:
    rows, size = SMOKE_MOVE if setting.smoke else MOVE
    for ball in (False, True):
        case = f"one move of {rows}x{size}, {'L2 ball' if ball else 'no ball'}, float32"
        setting.measure(case, partial(_move, setting, case, rows, size, ball))
    case = Case("toy", "both", rows=2) if setting.smoke else Case("tiny", "both")
    setting.measure(f"one VILLA step, {case}", partial(_step, setting, f"one VILLA step, {case}", case))


def _move(setting: Setting, case: str, rows: int, size: int, ball: bool) -> None:
    tensors = Tensors.of(setting, rows, size, ball=ball)
    calls = {"ours": tensors.ours(backend="triton"), "published": tensors.published()}
    _kernels(setting, case, calls, most=1)
    count, rounds = (1, 1) if setting.smoke else (CALLS, ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(host_seconds(call, setting.device, count))
    note = f"{1e6 * quartiles(times['ours'])[1]:.1f} µs of the host a call"
    setting.ratio(case, "host time over the published update's", times, of="ours", over="published", note=note)


def _step(setting: Setting, title: str, case: Case) -> None:
    bench = Bench(case, setting.device)
    works: dict[str, Callable[..., None]] = {
        "published loop": bench.published,
        "ours": partial(bench.villa, dropout="fresh"),
        "unavoidable": partial(bench.unavoidable, shared=False),
    }
    calls = {name: bench.update(work) for name, work in works.items()}
    for call in calls.values():
        call()
    _kernels(setting, title, calls)
    times = setting.times(calls, Pace(budget=5.0, least=5, most=40))
    setting.ratio(title, "time over the published loop's", times, of="ours", over="published loop")
    setting.ratio(title, "time over the passes it cannot avoid", times, of="ours", over="unavoidable")


def _kernels(setting: Setting, case: str, calls: dict[str, Callable[[], Any]], most: int | None = None) -> None:
    """What each way puts on the device; on a CPU, operations that torch dispatches."""
    kind = "kernels" if setting.cuda else "operations"
    counts = {name: launches(call) if setting.cuda else operations(call) for name, call in calls.items()}
    asked = {"goal": f"at most {most}", "reached": counts["ours"] <= most} if most and setting.cuda else {}
    others = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "ours")
    setting.add(setting.row(case, f"{kind} a call", value=float(counts["ours"]), note=others, **asked))


def operations(call: Callable[[], object]) -> int:
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        call()
    return count.total
