"""Updates of published methods in units of a forward, a third of a forward and backward of the same model in the same run.

Beside each: the passes that it cannot do without, bare. LAT is on a decoder with its site in the ninth of twelve layers;
what lies below runs once for all moves, so that its limit is fewer layers than its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from measures import Extent, device_of, extent_of, flops
from races import Entry, Pace, Race, recorded
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from advvl import AdversarialTraining, Site, adapt, fare, lat, pgd, tecoa, trades
from advvl.recipes.answers import prompts

pytestmark = pytest.mark.benchmark(timer=recorded)

CLASSES, PATCH, WORDS, SITE, MOVES, UPDATES = 10, 8, 24, 8, 16, 4
SMALL = {"radius": 8 / 255, "step_size": 2 / 255}


@dataclass(frozen=True)
class Case:
    """One method on a model of how many layers of which width, on batches of how many rows."""

    method: str
    layers: int = 4
    width: int = 256
    rows: int = 8

    def __str__(self) -> str:
        return f"{self.method}, {self.layers} layers of {self.width}, {self.rows} rows"


METHODS = ("PGD-7", "TRADES-10", "FARE-10", "TeCoA-10", "LAT")
GOALS = {"PGD-7": 17, "TRADES-10": 27, "FARE-10": 24, "TeCoA-10": 23}  # units
PASSES = {  # forwards, backwards to the input alone, backwards
    "PGD-7": (8, 7, 1),
    "TRADES-10": (12, 10, 2),
    "FARE-10": (12, 10, 1),
    "TeCoA-10": (11, 10, 1),
}


def cases(device: torch.device, extent: Extent) -> list[Case]:
    if extent == "smoke":
        return [Case(method, layers=12 if method == "LAT" else 2, width=32, rows=2) for method in METHODS]
    width, rows = (768, 64) if device.type == "cuda" else (512, 16) if extent == "full" else (256, 8)
    return [Case(method, 12 if method == "LAT" else 4, width, rows) for method in METHODS]


class Pixels:
    """An image model, a batch, and the lanes of one method that perturbs its pixels."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        sizes = {
            "hidden_size": case.width,
            "intermediate_size": 4 * case.width,
            "num_hidden_layers": case.layers,
            "num_attention_heads": case.width // 32,
            "image_size": 4 * PATCH,
            "patch_size": PATCH,
        }
        self.batch = {"pixel_values": torch.rand(case.rows, 3, 4 * PATCH, 4 * PATCH, device=device)}
        labels = torch.randint(CLASSES, (case.rows,), device=device)
        self.model: nn.Module
        if case.method in ("FARE-10", "TeCoA-10"):
            self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=case.width))
            patches = "vision_model.embeddings.patch_embedding"
        else:
            self.model = ViTForImageClassification(ViTConfig(**sizes, num_labels=CLASSES))
            patches = "vit.embeddings.patch_embeddings.projection"
            self.batch["labels"] = labels
        self.model.to(device).train()
        self.target = adapt(
            self.model,
            {"image": Site(patches, at="input")},
            call=lambda model, batch: model(**{k: v for k, v in batch.items() if k != "targets"}),
        )
        texts = torch.randn(CLASSES, case.width, device=device)
        self.method: AdversarialTraining = {
            "PGD-7": lambda: pgd(**SMALL),
            "TRADES-10": lambda: trades(**SMALL),
            "FARE-10": lambda: fare(self.model, **SMALL),
            "TeCoA-10": lambda: tecoa(texts, **SMALL),
        }[case.method]()
        if case.method == "TeCoA-10":
            self.batch["labels"] = labels
            self.target = adapt(
                self.model, {"image": Site(patches, at="input")}, call=lambda model, batch: model(batch["pixel_values"])
            )

    def ours(self) -> None:
        self.model.zero_grad()
        self.method.step(self.target, self.batch)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def loss(self, pixels: Tensor) -> Tensor:
        outputs: Any = self.model(pixels)
        found: Tensor = outputs.logits if "logits" in outputs else outputs.image_embeds
        return found.square().mean()

    def unavoidable(self) -> None:
        """As many passes as the method has, and nothing else; the first forwards are the clean pass and the reference."""
        forwards, to_input, backwards = PASSES[self.case.method]
        pixels = self.batch["pixel_values"]
        self.model.zero_grad()
        kept = [self.loss(pixels) for _ in range(backwards - 1)]  # a clean pass that gradients reach
        for _ in range(forwards - to_input - backwards):
            with torch.no_grad():
                self.loss(pixels)
        for _ in range(to_input):
            leaf = pixels.detach().requires_grad_()
            torch.autograd.grad(self.loss(leaf), leaf)
        torch.stack([*kept, self.loss(pixels)]).sum().backward()

    def unit(self) -> None:
        self.model.zero_grad()
        self.loss(self.batch["pixel_values"]).backward()


class Latent:
    """A decoder, a batch of pairs, and LAT in one of its layers, in eval mode as it has no dropout."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=case.width,
            intermediate_size=4 * case.width,
            num_hidden_layers=case.layers,
            num_attention_heads=case.width // 32,
        )
        self.model = LlamaForCausalLM(config).to(device).eval()
        ids = torch.randint(1000, (2 * (case.rows // 2), WORDS), device=device)
        half = len(ids) // 2
        ids[half:, : WORDS // 2] = ids[:half, : WORDS // 2]  # the same prompts with other answers
        labels = ids.clone()
        labels[:, : WORDS // 2] = -100
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.site = f"model.layers.{SITE}"
        self.target = adapt(
            self.model,
            {"hidden": Site(self.site, mask=prompts)},
            call=lambda model, batch: model(
                batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ),
            pure=True,
        )
        self.method = lat(steps=MOVES, updates=UPDATES)
        self.last: list[Tensor] = []

    def ours(self) -> None:
        self.method.step(self.target, self.batch, update=self.update)

    def update(self) -> None:
        """In the place of an optimiser's: drops the gradients, of which the last ones are kept for the check."""
        self.last = self.gradients()
        self.model.zero_grad()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None] or self.last

    def unavoidable(self) -> None:
        """The layers up to the site once, N times those above it with a backward, M times all of them."""
        climb, teach = self.method.climb, self.method.teach
        assert climb is not None
        assert teach.loss is not None
        seen = self.below()
        for _ in range(MOVES):
            hidden = seen["hidden"].detach().requires_grad_()
            torch.autograd.grad(climb.loss(self.above(hidden, seen), self.batch).sum(), hidden)  # type: ignore[misc]
        for _ in range(UPDATES):
            teach.loss(self.target.forward(self.batch), self.batch).mean().backward()
            self.update()

    def unit(self) -> None:
        loss = self.method.teach.loss
        assert loss is not None
        loss(self.target.forward(self.batch), self.batch).mean().backward()
        self.update()

    def above(self, hidden: Tensor, seen: Mapping[str, Any]) -> Mapping[str, Tensor]:
        for layer in self.model.model.layers[SITE + 1 :]:
            hidden = layer(hidden, **seen["arguments"])
        return {"logits": self.model.lm_head(self.model.model.norm(hidden))}

    def below(self) -> dict[str, Any]:
        """Run the layers up to the site, and return what the layer above is called with."""
        seen: dict[str, Any] = {}

        def stop(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            del module
            seen.update(hidden=args[0], arguments=kwargs)
            raise StopIteration

        handle = self.model.model.layers[SITE + 1].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), suppress(StopIteration):
                self.target.forward(self.batch)
        finally:
            handle.remove()
        return seen


Bench = Pixels | Latent


def entry(bench: Bench, work: Callable[[], None], role: Any, *, repeats: int = 1) -> Entry:
    def check() -> None:
        work()
        gradient = torch.cat([gradient.flatten() for gradient in bench.gradients()])
        assert gradient.isfinite().all()
        assert gradient.any()

    def call() -> None:
        for _ in range(repeats):
            work()

    call()
    facts = {
        "method": bench.case.method,
        "goal": GOALS.get(bench.case.method),
        "rows": bench.case.rows,
        "flops": flops(work),
    }
    return Entry(call, check, role, facts, repeats)


LANES: dict[str, Callable[[Bench], Entry]] = {
    "ours": lambda bench: entry(bench, bench.ours, "ours"),
    "unavoidable": lambda bench: entry(bench, bench.unavoidable, "limit"),
    "forward and backward": lambda bench: entry(bench, bench.unit, "limit", repeats=4),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, extent = device_of(metafunc.config), extent_of(metafunc.config)
    pairs = [(case, name) for case in cases(device, extent) for name in LANES]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


def test_method(race: Race, device: torch.device, case: Case, name: str) -> None:
    def build() -> dict[str, Callable[[], Entry]]:
        bench = Latent(case, device) if case.method == "LAT" else Pixels(case, device)
        return {lane: partial(make, bench) for lane, make in LANES.items()}

    race("methods", str(case), name, build, Pace(budget=20.0, least=5, most=20))
