"""A step through a model that `torch.compile(mode="reduce-overhead")` made: does it run, the gradient, and the time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from support.toy import toy, toy_batch
from test_step import Bench, Case

import advvl
from advvl import Adapter, AdversarialTraining
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

CLOSE = 1e-3  # of the whole gradient, in fp32 without dropout
METHODS: dict[str, Callable[[], Any]] = {
    "FreeLB": lambda: advvl.freelb(step_sizes={"text": 1e-3, "image": 1e-3}),
    "VILLA": lambda: advvl.villa(step_sizes={"text": 1e-3, "image": 1e-3}),
}
MODES: dict[str, dict[str, str]] = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
SMOKE_MODES: dict[str, dict[str, str]] = {"traced": {"backend": "eager"}}


def run(setting: Setting) -> None:
    for mode, options in (SMOKE_MODES if setting.smoke else MODES).items():
        for name, make in list(METHODS.items())[: 1 if setting.smoke else None]:
            case = f"{name}, compiled, {mode}"
            setting.measure(case, partial(_case, setting, case, make(), options))


def _case(setting: Setting, case: str, method: Any, options: dict[str, str]) -> None:
    torch.compiler.reset()
    eager, batch = _scene(setting)
    eager.model.eval()  # no dropout: the gradients can be compared
    compiled = eager.through(torch.compile(eager.model, **options))  # hooks are there before the first compiled call
    calls = {name: partial(_step, method, target, batch) for name, target in (("eager", eager), ("compiled", compiled))}
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
        found[name] = torch.cat([p.grad.flatten() for p in eager.model.parameters() if p.grad is not None])
    setting.add(setting.row(case, "it runs", value=1.0, goal="1", reached=True))
    error = float((found["compiled"] - found["eager"]).norm() / found["eager"].norm())
    setting.add(
        setting.row(case, "gradient, off that of eager by", value=error, goal="at most 1e-3", reached=error <= CLOSE)
    )
    times = setting.times(calls, Pace(budget=3.0, least=5, most=40))
    setting.ratio(case, "time over that of eager", times, of="compiled", over="eager")


def _scene(setting: Setting) -> tuple[Adapter, dict[str, torch.Tensor]]:
    if setting.smoke:  # tracing a UNITER takes a minute
        return toy(dtype=torch.float32), toy_batch(dtype=torch.float32)
    bench = Bench(Case("tiny", "both", rows=16), setting.device)
    return bench.target, bench.inputs


def _step(method: AdversarialTraining, target: Adapter, batch: dict[str, torch.Tensor]) -> None:
    target.model.zero_grad()
    method.step(target, batch)
