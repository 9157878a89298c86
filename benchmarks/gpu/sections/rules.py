"""A step under every rule of the ascent and of every recipe, against as many bare passes of the model as it ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from test_step import Bench, Case
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import advvl
from advvl import L2, PGD, Adam, Adapter, AdversarialTraining, Ascent, EmbeddingPerturber, Momentum
from advvl.models.huggingface.pixels import PixelInput
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Pace

STEP, RADIUS, PIXEL = 1e-3, 1.0, 1 / 255
SIZES = {"text": STEP, "image": STEP}
CLASSES, PROJECTION = 10, 64


@dataclass(frozen=True)
class Subject:
    """A model to train, its batch, and one forward and backward of it."""

    target: Adapter
    batch: dict[str, Tensor]
    bare: Callable[[], None]


RULES: dict[str, Any] = {"normalised": "normalised", "sign": "sign", "momentum": Momentum(), "Adam": Adam()}
ON_UNITER: dict[str, Callable[[], AdversarialTraining]] = {
    "villa": lambda: advvl.villa(step_sizes=SIZES),
    "freelb": lambda: advvl.freelb(step_sizes=SIZES),
    "pgd": lambda: advvl.pgd(step_size=STEP, radius=RADIUS, steps=3),
    "free_at": lambda: advvl.free_at(radius=STEP, replays=3, carry=False),
    "lxmert_adv": lambda: advvl.lxmert_adv("vqa"),
    "trades": lambda: advvl.trades(radius=RADIUS, step_size=STEP, steps=3),
    "vat": lambda: advvl.vat(radius=RADIUS),
    "smart": lambda: advvl.smart(),
    "neftune": lambda: advvl.neftune(),
}
ON_CLIP: dict[str, Callable[[nn.Module], AdversarialTraining]] = {
    "fare": lambda model: advvl.fare(model, radius=4 * PIXEL, step_size=PIXEL, steps=3),
    "tecoa": lambda model: advvl.tecoa(
        torch.randn(CLASSES, PROJECTION, device=next(model.parameters()).device),
        radius=4 * PIXEL,
        step_size=PIXEL,
        steps=3,
    ),
}


def run(setting: Setting) -> None:
    uniter = _uniter(setting)
    for name, rule in RULES.items():
        ascents = {modality: Ascent(L2(RADIUS), step_size=STEP, rule=rule) for modality in SIZES}
        method = AdversarialTraining(EmbeddingPerturber(**ascents), PGD(3))
        setting.measure(f"rule {name}", partial(_against_bare, setting, f"rule {name}", uniter, method))
    for name, make in ON_UNITER.items():
        setting.measure(f"recipe {name}", partial(_made, setting, f"recipe {name}", uniter, make))
    clip = _clip(setting)
    for name, make_for in ON_CLIP.items():
        make = partial(make_for, clip.target.model)
        setting.measure(f"recipe {name}", partial(_made, setting, f"recipe {name}", clip, make))


def _uniter(setting: Setting) -> Subject:
    bench = Bench(Case("toy", "both", rows=2) if setting.smoke else Case("tiny", "both", rows=32), setting.device)
    return Subject(bench.target, bench.inputs, partial(bench.bare, bench.inputs, count=1))


def _clip(setting: Setting) -> Subject:
    sizes = (32, 2, 32, 16, 2) if setting.smoke else (768, 12, 224, 16, 32)
    width, layers, side, patch, rows = sizes
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=side,
        patch_size=patch,
        projection_dim=PROJECTION,
    )
    model = PixelInput(CLIPVisionModelWithProjection(config), [0.5] * 3, [0.25] * 3).to(setting.device)
    pixels = torch.rand(rows, 3, side, side, device=setting.device)
    batch = {"pixel_values": pixels, "labels": torch.randint(CLASSES, (rows,), device=setting.device)}
    return Subject(advvl.adapt(model), batch, lambda: model(pixels).image_embeds.square().sum().backward())


def _made(setting: Setting, case: str, subject: Subject, make: Callable[[], AdversarialTraining]) -> None:
    _against_bare(setting, case, subject, make())


def _against_bare(setting: Setting, case: str, subject: Subject, method: AdversarialTraining) -> None:
    """The step's time over that of as many forward and backward passes."""
    model, passes = subject.target.model, list[int]()

    def ours() -> None:
        model.zero_grad()
        method.step(subject.target, subject.batch, update=model.zero_grad)  # FreeAT asks for one after every replay

    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        ours()
    finally:
        handle.remove()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"expected finite gradients, not of {name}"

    def bare() -> None:
        model.zero_grad()
        for _ in passes:
            subject.bare()

    times = setting.times({"ours": ours, "bare passes": bare}, Pace(budget=1.5, least=5, most=30))
    measure = f"time over {len(passes)} bare passes"
    setting.ratio(case, measure, times, of="ours", over="bare passes", passes=len(passes))
