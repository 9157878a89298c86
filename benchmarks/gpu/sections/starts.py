"""Random starts of pixels: drawn from a generator of the CPU, from one of the device, and the bare draw."""

from __future__ import annotations

from functools import partial

import torch

from advvl import L2, Linf, Normal, Place, Uniform
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

SHAPE, SMOKE_SHAPE = (256, 3, 224, 224), (2, 3, 8, 8)


def run(setting: Setting) -> None:
    for name, start, ball in (("Uniform, Linf", Uniform(0.03), Linf(0.03)), ("Normal, L2", Normal(0.01), L2(1.0))):
        shape = SMOKE_SHAPE if setting.smoke else SHAPE
        case = f"{name}, {'x'.join(map(str, shape))}"
        setting.measure(case, partial(_case, setting, case, shape, start, ball))


def _case(setting: Setting, case: str, shape: tuple[int, ...], start: Normal | Uniform, ball: L2 | Linf) -> None:
    place = Place(torch.zeros(shape, device=setting.device))
    generators = {"on the CPU": torch.Generator().manual_seed(0)}
    if setting.cuda:
        generators["on the device"] = torch.Generator(setting.device).manual_seed(0)
    draw = torch.rand if isinstance(start, Uniform) else torch.randn
    calls = {name: partial(start.make, ball, place, generator) for name, generator in generators.items()}
    calls["bare draw on the device"] = partial(draw, shape, device=setting.device)
    for call in calls.values():
        call()
    times = setting.times(calls, Pace(budget=4.0, least=3, most=20))
    for name in generators:
        setting.ratio(case, f"drawn {name}: time over the bare draw's", times, of=name, over="bare draw on the device")
    for name, generator in generators.items():
        first = start.make(ball, place, generator.manual_seed(1))
        same = torch.equal(first, start.make(ball, place, generator.manual_seed(1)))
        setting.add(setting.row(case, f"drawn {name}: the same bits twice", value=float(same), goal="1", reached=same))
