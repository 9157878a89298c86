"""One side of `against.py`: the steps and attacks that are timed, by the advvl of the checkout that PYTHONPATH names.

A process of it says what it has, then answers every line `CASE LOOPS` by the seconds of a call. It uses names of
`from advvl import …` alone, on plain modules, so that it runs on checkouts of any layout.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import advvl
from advvl import L2, PGD, Adapter, AdversarialTraining, Ascent, Attack, EmbeddingPerturber, FreeAT, Linf, Site

STEP_SIZE, RADIUS = 0.3, 1.0  # far enough that a change of the method shows in what it computes
WORDS, REGIONS, FEATURES, VOCABULARY, CLASSES = 20, 12, 64, 500, 10


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    rows: int


SIZES = {"small": Size(32, 1, 2, 4), "medium": Size(192, 3, 4, 6)}


class Layer(nn.Module):
    """A layer of BERT's."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.norms[0](x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norms[1](x + self.dropout(self.down(F.gelu(self.up(x)))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Words and regions to class scores."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words, self.regions = nn.Embedding(VOCABULARY, size.width), nn.Linear(FEATURES, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.head = nn.Linear(size.width, CLASSES)

    def forward(self, ids: Tensor, regions: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.words(ids), self.regions(regions)], 1)
        everything = torch.cat([mask, mask.new_ones(regions.shape[:2])], 1)
        for layer in self.layers:
            x = layer(x, everything)
        logits = self.head(x[:, 0])
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def batch_of(rows: int) -> dict[str, Tensor]:
    lengths = torch.arange(rows) % (WORDS // 2) + WORDS // 2
    return {
        "ids": torch.randint(VOCABULARY, (rows, WORDS)),
        "regions": torch.randn(rows, REGIONS, FEATURES),
        "mask": torch.arange(WORDS) < lengths[:, None],
        "labels": torch.randint(CLASSES, (rows,)),
    }


def methods() -> dict[str, Any]:
    """Every way to step."""
    both = {"text": STEP_SIZE, "image": STEP_SIZE}

    def perturber(ball: Any) -> EmbeddingPerturber:
        return EmbeddingPerturber(**{name: Ascent(ball, step_size=STEP_SIZE) for name in both})

    return {
        "VILLA, together": advvl.villa(step_sizes=both),
        "VILLA, in turn": advvl.villa(step_sizes=both, modalities="in turn"),
        "VILLA, shared masks": advvl.villa(step_sizes=both, dropout="shared"),
        "FreeLB": advvl.freelb(step_sizes=both, steps=3),
        "FreeAT": AdversarialTraining(perturber(Linf(RADIUS)), FreeAT(3, carry=False)),
        "PGD training": AdversarialTraining(perturber(L2(RADIUS)), PGD(3)),
        "PGD attack": Attack(perturber(L2(RADIUS)), PGD(10)),
    }


class Case:
    """A method on a model and a batch."""

    def __init__(self, size: Size, method: Any) -> None:
        torch.manual_seed(0)
        model, self.batch, self.method = Model(size), batch_of(size.rows), method
        sites = {
            "text": Site("words", mask=lambda batch: batch["mask"]),
            "image": Site("regions", at="input"),
        }
        self.model, self.target = model, Adapter(model, sites)

    def call(self) -> Any:
        self.model.zero_grad()
        if isinstance(self.method, Attack):
            return self.method(self.target, self.batch)
        takes = {"update": self.update} if isinstance(self.method.maximizer, FreeAT) else {}
        return self.method.step(self.target, self.batch, **takes)

    def update(self) -> None:
        """A small step of gradient descent."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        self.model.zero_grad()

    def result(self) -> float:
        """A number that depends on all that is computed, from a seed: both sides have to come to the same."""
        torch.manual_seed(1)
        with torch.no_grad():
            before = [parameter.clone() for parameter in self.model.parameters()]
        done = self.call()
        if isinstance(self.method, Attack):
            return size(done.deltas.values())
        moved = [p.detach() - old for p, old in zip(self.model.parameters(), before, strict=True)]
        return size(p.grad for p in self.model.parameters() if p.grad is not None) + size(moved)

    def seconds(self, loops: int, draw: random.Random, clock: Callable[[], float]) -> float:
        ballast = [torch.empty(draw.randrange(2**14, 2**21), dtype=torch.uint8) for _ in range(20)]
        del ballast[::2]  # memory lies otherwise each time: that decides how often pages are asked for again
        gc.collect()
        gc.disable()
        start = clock()
        for _ in range(loops):
            self.call()
        took = clock() - start
        gc.enable()
        return took / loops


def size(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))


def cases(sizes: list[str]) -> dict[str, Callable[[], Case]]:
    return {
        f"{name}, {size}": partial(Case, SIZES[size], method) for size in sizes for name, method in methods().items()
    }


def main(root: str, clock_name: str, sizes: list[str]) -> None:
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[clock_name]
    home = Path(advvl.__file__).resolve()
    assert home.is_relative_to(Path(root).resolve()), f"expected the advvl of {root}, got that of {home}"
    made = {name: make() for name, make in cases(sizes).items()}
    results = {name: case.result() for name, case in made.items()}
    draw = random.Random(0)
    warm = {name: case.seconds(1, draw, clock) for name, case in made.items()}
    print(json.dumps({"results": results, "warm": warm}), flush=True)
    for line in sys.stdin:
        name, loops = json.loads(line)
        print(json.dumps(made[name].seconds(loops, draw, clock)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
