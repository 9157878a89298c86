"""A step through a model that `torch.compile(mode="reduce-overhead")` made: does it run, the gradient, and the time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from test_step import Bench, Case

import advvl
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

CLOSE = 1e-3  # of the whole gradient, in fp32 without dropout
METHODS: dict[str, Callable[[], Any]] = {
    "FreeLB": lambda: advvl.freelb(step_sizes={"text": 1e-3, "image": 1e-3}),
    "VILLA": lambda: advvl.villa(step_sizes={"text": 1e-3, "image": 1e-3}),
}
MODES: dict[str, dict[str, str]] = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
SMOKE_MODES: dict[str, dict[str, str]] = {"aot_eager": {"backend": "aot_eager"}}


def run(setting: Setting) -> None:
    for mode, options in (SMOKE_MODES if setting.smoke else MODES).items():
        for name, make in METHODS.items():
            case = f"{name}, compiled, {mode}"
            setting.measure(case, partial(_case, setting, case, make(), options))


def _case(setting: Setting, case: str, method: Any, options: dict[str, str]) -> None:
    torch.compiler.reset()
    bench = Bench(Case("toy", "both", rows=2) if setting.smoke else Case("tiny", "both", rows=16), setting.device)
    bench.model.eval()  # no dropout: the gradients can be compared
    eager = bench.target
    compiled = eager.through(torch.compile(bench.model, **options))  # hooks are there before the first compiled call
    calls = {
        name: bench.update(partial(_step, method, target))
        for name, target in (("eager", eager), ("compiled", compiled))
    }
    found: dict[str, torch.Tensor] = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own
                for _ in range(3):  # compiles, records, replays
                    call()
        except Exception as error:  # a finding: that is what is asked
            note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            setting.add(setting.row(case, "it runs", value=0.0, goal="1", reached=False, note=note))
            return
        found[name] = torch.cat([p.grad.flatten() for p in bench.model.parameters() if p.grad is not None])
    setting.add(setting.row(case, "it runs", value=1.0, goal="1", reached=True))
    error = float((found["compiled"] - found["eager"]).norm() / found["eager"].norm())
    setting.add(
        setting.row(case, "gradient, off that of eager by", value=error, goal="at most 1e-3", reached=error <= CLOSE)
    )
    times = setting.times(calls, Pace(budget=3.0, least=5, most=40))
    setting.ratio(case, "time over that of eager", times, of="compiled", over="eager")


def _step(method: Any, target: Any, inputs: dict[str, torch.Tensor]) -> None:
    method.step(target, inputs)
