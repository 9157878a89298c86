"""An evaluation of CLIP-base by `worst_case`, and the model's own passes in it, run bare: the same ones, one after another.

A pass is a forward, and where the evaluation asks for gradients a backward towards the pixels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from measures import extent_of
from races import Entry, Pace, Race, recorded
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from advvl import L2, PGD, adapt
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.objectives import margin
from advvl.evaluation.rows import take_rows
from advvl.evaluation.worst_case import worst_case
from advvl.maximizers.random_search import RandomSearch

pytestmark = pytest.mark.benchmark(timer=recorded)

CLASSES, WORDS, RADIUS = 4, 8, 0.01  # most examples hold, and are attacked by all
LANES = ("ours", "bare passes")


@dataclass
class Passes:
    """The passes that a model is seen to make: the number of images, and whether a gradient is wanted."""

    found: list[tuple[int, bool]] = field(default_factory=list)

    def see(self, model: CLIPModel, args: Any, kwargs: dict[str, Any]) -> None:
        del model, args
        self.found.append((len(kwargs["pixel_values"]), torch.is_grad_enabled()))


class Bench:
    """CLIP of its default sizes with random weights, and one batch that it answers rightly by definition."""

    def __init__(self, images: int, steps: int, device: torch.device) -> None:
        self.model = CLIPModel(CLIPConfig()).to(device).eval()
        prompts = torch.randint(1, 1000, (CLASSES, WORDS), device=device)
        prompts[:, -1] = self.model.config.text_config.eos_token_id
        self.batch = {"pixel_values": torch.randn(images, 3, 224, 224, device=device), "input_ids": prompts}
        with torch.no_grad():
            self.batch["targets"] = self.logits(self.batch["pixel_values"]).argmax(1)
        self.attacks = [
            NamedAttack(name="PGD", maximizer=PGD(steps)),
            NamedAttack(name="random search", maximizer=RandomSearch(steps), objective=margin, step_fraction=2.0),
        ]
        self.target = adapt(self.model, call=lambda model, batch: self.logits(batch["pixel_values"]))
        self.seen: list[tuple[int, bool]] = []
        self.facts = {
            "shape": f"{images} images of 3x224x224, {CLASSES} prompts of {WORDS} words, width 768 and 512, 12 layers",
            "dtype": "float32",
        }

    def logits(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=self.batch["input_ids"], pixel_values=images).logits_per_image
        return found

    def ours(self) -> Entry:
        """Of the protocol as it is by default, with its checks."""
        results = list[Measurement]()

        def call() -> None:
            rows = partial(take_rows, whole=("input_ids",))
            results[:] = [worst_case(self.target, [self.batch], {"image": L2(RADIUS)}, attacks=self.attacks, rows=rows)]

        passes = Passes()
        handle = self.model.register_forward_pre_hook(passes.see, with_kwargs=True)
        call()
        handle.remove()
        self.seen = passes.found

        def check() -> None:
            assert results[0].clean.all()
            assert not results[0].unmoved.any()

        return Entry(call, check, "ours", self.facts | {"passes": len(self.seen)})

    def bare(self) -> Entry:
        found = list[Tensor]()

        def call() -> None:
            for images, wanted in self.seen:
                pixels = self.batch["pixel_values"][:images].detach()
                if not wanted:
                    with torch.no_grad():
                        found[:] = [self.logits(pixels)]
                    continue
                pixels.requires_grad_()
                loss = F.cross_entropy(self.logits(pixels), self.batch["targets"][:images], reduction="sum")
                found[:] = list(torch.autograd.grad(loss, pixels))

        assert any(wanted for _, wanted in self.seen)
        return Entry(call, lambda: None, "limit", self.facts | {"passes": len(self.seen)})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("name", LANES)


def test_evaluation(race: Race, device: torch.device, pytestconfig: pytest.Config, name: str) -> None:
    extent = extent_of(pytestconfig)
    images, steps = (1, 1) if extent == "smoke" else (64, 20) if device.type == "cuda" else (2, 4)

    def build() -> dict[str, Callable[[], Entry]]:
        bench = Bench(images, steps, device)
        return dict(zip(LANES, (bench.ours, bench.bare), strict=True))

    race("evaluation", f"CLIP-base, {images} images, {steps} steps", name, build, Pace(budget=30.0, least=3, most=20))
