"""Recipes run as many forwards and backwards per update as docs/methods.md says: counted, at a layer of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from advvl import AdversarialTraining, Averaged, Site, adapt
from advvl.recipes import (
    agft,
    alum,
    awp,
    dat,
    fare,
    fgm,
    fgsm_rs,
    free_at,
    freelb,
    lat,
    modality_interference,
    neftune,
    pgd,
    pmg_aft,
    r_drop,
    sam,
    smart,
    tecoa,
    trades,
    vat,
    villa,
    vilta,
)

WIDTH, INNER, CLASSES, ROWS, LENGTH = 5, 7, 3, 4, 6


class Counts(NamedTuple):
    """Runs of a layer: forwards, gradients of its input, gradients of its weights."""

    forwards: int
    to_input: int
    to_weights: int


class Network(nn.Module):
    """Embedded words and two layers, of which the lower one is counted; its weights are of a shape of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, WIDTH)
        self.counted, self.above = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pooled = self.above(torch.tanh(self.counted(self.words(ids)))).mean(1)
        logits = self.head(pooled)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"logits": logits, "pooler_output": pooled, "loss": losses}


class Products(TorchDispatchMode):
    """Counts the matrix products of the counted layer, by their kind and the shapes of their sides."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        forward = ("addmm", (positions, WIDTH), (WIDTH, INNER))
        to_input = ("mm", (positions, INNER), (INNER, WIDTH))
        to_weights = ("mm", (INNER, positions), (positions, WIDTH))
        self.found = dict.fromkeys((forward, to_input, to_weights), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "addmm"):
            product = (name, *(tuple(side.shape) for side in args[-2:]))
            if product in self.found:
                self.found[product] += 1
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> Counts:
        return Counts(*self.found.values())


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    return {"ids": torch.randint(10, (ROWS, LENGTH), generator=generator), "labels": labels}


SMALL = {"radius": 0.1, "step_size": 0.02}
TEXT = {"modality": "text"}
TEXTS = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))

CASES: dict[str, tuple[Callable[[nn.Module], AdversarialTraining], Counts]] = {
    "villa": (lambda model: villa(), Counts(4, 4, 4)),
    "villa-shared": (lambda model: villa(dropout="shared"), Counts(3, 4, 3)),
    "freelb": (lambda model: freelb(), Counts(3, 3, 3)),
    "pgd-7": (lambda model: pgd(**SMALL, **TEXT), Counts(8, 7 + 1, 1)),  # type: ignore[arg-type]
    "trades-10": (lambda model: trades(**SMALL, **TEXT), Counts(12, 10 + 2, 2)),  # type: ignore[arg-type]
    "fare-10": (lambda model: fare(model, **SMALL, **TEXT, box=None), Counts(12, 10 + 1, 1)),  # type: ignore[arg-type]
    "tecoa-10": (lambda model: tecoa(TEXTS, **SMALL, **TEXT, box=None), Counts(11, 10 + 1, 1)),  # type: ignore[arg-type]
    "vat": (lambda model: vat(radius=0.1, modality="text"), Counts(3, 1 + 2, 2)),
    "vat-unlabelled": (lambda model: vat(radius=0.1, modality="text", task_weight=0), Counts(3, 1 + 1, 1)),
    "smart": (lambda model: smart(), Counts(3, 1 + 2, 2)),
    "smart-bregman": (lambda model: smart(bregman=Averaged(model)), Counts(4, 1 + 2, 2)),
    "alum": (lambda model: alum(), Counts(3, 1 + 2, 2)),
    "neftune": (lambda model: neftune(), Counts(1, 1, 1)),
    "fgm": (lambda model: fgm(), Counts(2, 2, 2)),
    "fgsm-rs": (lambda model: fgsm_rs(radius=0.1, modality="text"), Counts(2, 1 + 1, 1)),
    "r-drop": (lambda model: r_drop(), Counts(2, 2, 2)),
    "agft": (
        lambda model: agft(model, TEXTS, **SMALL, **TEXT, box=None, temperature=2.0),  # type: ignore[arg-type]
        Counts(12, 10 + 1, 1),
    ),
    "pmg-aft": (lambda model: pmg_aft(model, TEXTS, **SMALL, **TEXT, box=None), Counts(5, 2 + 2, 2)),  # type: ignore[arg-type]
    "modality-interference": (lambda model: modality_interference(("text",), **SMALL), Counts(3, 1 + 2, 2)),
    "dat": (lambda model: dat(lambda x: x, box=None, modality="text"), Counts(3, 1 + 2, 2)),
    "vilta": (lambda model: vilta(Averaged(model)), Counts(2, 1, 1)),
    "sam": (lambda model: sam(), Counts(2, 2, 2)),
    "awp-pgd-7": (lambda model: awp(pgd(**SMALL, **TEXT)), Counts(9, 7 + 2, 2)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_an_update_runs_the_model_so_often(make: Callable[[nn.Module], AdversarialTraining], expected: Counts) -> None:
    model = Network()
    method, target = make(model), adapt(model, {"text": "words"})
    method.step(target, batch())  # with shared masks the first step checks them, by one forward more
    with Products(ROWS * LENGTH) as seen:
        method.step(target, batch())
    assert seen.counts == expected


def test_free_at_runs_the_model_once_for_each_of_its_updates() -> None:
    model = Network()
    method = free_at(radius=0.1, modality="text", replays=8, carry=False)
    with Products(ROWS * LENGTH) as seen:
        method.step(adapt(model, {"text": "words"}), batch(), update=model.zero_grad)
    assert seen.counts == Counts(8, 8, 8)


class Decoder(nn.Module):
    """A counted layer below the perturbed one, or above it."""

    def __init__(self, *, below: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(10, WIDTH)
        self.counted, self.back = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.site = nn.Identity()
        self.head = nn.Linear(WIDTH, 10)
        self.below = below

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.words(input_ids)
        hidden = hidden if self.below else self.site(hidden)
        hidden = self.back(torch.tanh(self.counted(hidden)))
        return {"logits": self.head(self.site(hidden) if self.below else hidden)}


@pytest.mark.parametrize("below", [True, False], ids=["below", "above"])
def test_lat_runs_what_lies_below_its_site_once_for_all_moves(below: bool) -> None:
    ids = batch()["ids"]
    ids[ROWS // 2 :, :3] = ids[: ROWS // 2, :3]
    labels = torch.where(torch.arange(LENGTH) < 3, -100, ids)
    pairs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    model, moves, updates = Decoder(below=below).eval(), 16, 4
    prompt = Site("site", mask=lambda batch: batch["labels"] == -100)
    target = adapt(model, {"hidden": prompt}, pure=True)
    with Products(ROWS * LENGTH) as seen:
        lat(steps=moves, updates=updates).step(target, pairs, update=model.zero_grad)
    once = 1 if below else moves
    assert seen.counts == Counts(once + updates, (0 if below else moves) + updates, updates)
