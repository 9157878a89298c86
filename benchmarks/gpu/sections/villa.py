"""A VILLA update of UNITER base and large, in fp32 and bf16, against the published loop and the passes it cannot avoid."""

from __future__ import annotations

from functools import partial

import torch
from measures import peak_bytes
from test_step import LARGE, Bench, Case

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

CASES = [
    Case(size, "both", dtype, rows)
    for size, rows in (("base, 12 layers", 32), (LARGE, 16))
    for dtype in (torch.bfloat16, torch.float32)
]
SMOKE_CASES = [Case("toy", "both", dtype, 2) for dtype in (torch.bfloat16, torch.float32)]
CLOSE = 1e-3  # of the whole gradient, in fp32 without dropout


def run(setting: Setting) -> None:
    for case in SMOKE_CASES if setting.smoke else CASES:
        setting.measure(str(case), partial(_case, setting, case))


def _case(setting: Setting, case: Case) -> None:
    bench = Bench(case, setting.device)
    if case.dtype == torch.float32:
        _same_gradient(setting, bench)
    works = {
        "published loop": bench.published,
        "ours, fresh masks": partial(bench.villa, dropout="fresh"),
        "ours, shared masks": partial(bench.villa, dropout="shared"),
        "unavoidable, fresh masks": partial(bench.unavoidable, shared=False),
        "unavoidable, shared masks": partial(bench.unavoidable, shared=True),
    }
    calls = {name: bench.update(work) for name, work in works.items()}
    peaks = {name: peak_bytes(call, setting.device) for name, call in calls.items()}  # and a first call
    times = setting.times(calls, Pace(budget=12.0, least=4, most=25))
    for masks in ("fresh", "shared"):
        ours = f"ours, {masks} masks"
        goal = {"goal": "at least 2.0", "least": 2.0} if case.dtype == torch.bfloat16 and masks == "shared" else {}
        setting.ratio(
            str(case), f"{masks} masks: times as fast as the published loop", times, of="published loop", over=ours,
            **goal, peak_bytes=peaks, shape=bench.facts["shape"],
        )  # fmt: skip
        setting.ratio(
            str(case), f"{masks} masks: time over the passes it cannot avoid", times,
            of=ours, over=f"unavoidable, {masks} masks", goal="at most 1.03", most=1.03,
        )  # fmt: skip
        memory = peaks[ours] / peaks["published loop"]
        setting.add(setting.row(str(case), f"{masks} masks: peak memory over the published loop's", value=memory))


def _same_gradient(setting: Setting, bench: Bench) -> None:
    bench.model.eval()
    found = []
    for work in (bench.published, partial(bench.villa, dropout="fresh")):
        bench.update(work)()
        found.append(torch.cat([p.grad.flatten() for p in bench.model.parameters() if p.grad is not None]))
    bench.model.train()
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert error <= CLOSE, f"expected the published loop's gradient, got one that is off by {error:.1e} of its length"
    setting.add(
        setting.row(
            str(bench.case), "gradient, off the published one by", value=error, goal="at most 1e-3", reached=True
        )
    )
