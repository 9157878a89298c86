"""PGD training and free adversarial training are, in float64, the published loops: every weight after every update.

Both loops are written out over a model that takes a perturbation as an argument. Nothing of the library is in them but
PGD's random start, which is read off the library's own first pass.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.plain import WordNet, agree, words
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import Adapter, AscentState, PassTrace, Site, free_at, pgd

BOX = (0.0, 1.0)


class ConvNet(nn.Module):
    """Pixels `(B, 3, 4, 4)` to scores of 5 classes, with BatchNorm; `delta` is added to the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.norm = nn.Conv2d(3, 6, 2, 2), nn.BatchNorm2d(6)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, y: Tensor, delta: Tensor | None = None) -> dict[str, Tensor]:
        x = x if delta is None else x + delta
        logits = self.head(torch.tanh(self.norm(self.filters(x))).flatten(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, y)}


SITES = {
    ConvNet: {"image": Site("filters", at="input")},
    WordNet: {"text": Site("words", mask=lambda batch: batch["mask"])},
}


def made(kind: type[nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = kind().double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


def ours_of(kind: type[nn.Module]) -> tuple[Adapter, torch.optim.Optimizer]:
    model, optimizer = made(kind)
    return Adapter(model, SITES[kind]), optimizer


def pictures(*sizes: int, margin: float = 0.0) -> list[dict[str, Tensor]]:
    """Batches of pictures with pixels in [margin, 1 − margin]."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "x": margin + (1 - 2 * margin) * torch.rand(size, 3, 4, 4, generator=generator, dtype=torch.float64),
            "y": torch.randint(5, (size,), generator=generator),
        }
        for size in sizes
    ]


def agree_on_weights(found: nn.Module, expected: nn.Module) -> None:
    """Parameters and BatchNorm's statistics, which both see every pass."""
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, value in found.state_dict().items():
        agree(value.double(), theirs[name].double(), 1e-9, least=1e-3)


def madry(
    model: nn.Module,
    batch: dict[str, Tensor],
    start: Tensor,
    *,
    norm: str,
    eps: float,
    step: float,
    steps: int,
    box: Any,
) -> Tensor:
    """One iteration up to the optimiser's step: x′ ← Π(x′ + α sign ∇ℓ(x′)), then ∇ of ℓ at the last x′."""
    inner = batch["mask"].unsqueeze(-1) if "mask" in batch else 1.0
    delta = start
    for _ in range(steps):
        leaf = delta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(**batch, delta=leaf)["loss"], leaf)
        if norm == "linf":
            delta = (delta + step * gradient.sign() * inner).clamp(-eps, eps)
        else:
            length = (gradient * inner).flatten(1).norm(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
            delta = delta + step * gradient * inner / length
            length = delta.flatten(1).norm(dim=1).reshape(-1, *[1] * (delta.ndim - 1))
            delta = torch.where(length > eps, delta * eps / length, delta)
        if box is not None:
            delta = (batch["x"] + delta).clamp(*box) - batch["x"]
    model(**batch, delta=delta)["loss"].backward()
    return delta


@pytest.mark.parametrize(
    ("kind", "norm", "eps", "step", "box"),
    [
        pytest.param(ConvNet, "linf", 8 / 255, 2 / 255, BOX, id="pixels"),
        pytest.param(ConvNet, "linf", 0.3, 0.1, BOX, id="pixels-into-the-box"),
        pytest.param(ConvNet, "l2", 0.5, 0.2, BOX, id="pixels-l2"),
        pytest.param(WordNet, "linf", 0.2, 0.05, None, id="words"),
        pytest.param(WordNet, "l2", 0.5, 0.2, None, id="words-l2"),
    ],
)
def test_pgd_training(kind: type[nn.Module], norm: Any, eps: float, step: float, box: Any) -> None:
    target, optimizer = ours_of(kind)
    theirs, their_optimizer = made(kind)
    (modality,) = SITES[kind]
    method = pgd(radius=eps, step_size=step, steps=7, modality=modality, norm=norm, box=box)
    batches = pictures(6, 4, 5) if kind is ConvNet else [words(rows=4, seed=seed) for seed in range(3)]
    for number, batch in enumerate(batches):
        passes: list[PassTrace] = []
        method.step(target, batch, generator=torch.Generator().manual_seed(number), trace=passes.append)
        start = passes[0].deltas[modality]
        assert start.any()
        delta = madry(theirs, batch, start, norm=norm, eps=eps, step=step, steps=7, box=box)
        assert len(passes) == 8
        agree(passes[-1].deltas[modality], delta, 1e-9)
        for name, parameter in theirs.named_parameters():
            agree(target.model.get_parameter(name).grad, parameter.grad, 1e-9, least=1e-3)
        for one in (optimizer, their_optimizer):
            one.step()
            one.zero_grad()
        agree_on_weights(target.model, theirs)


@pytest.mark.parametrize("box", [None, BOX])
def test_pgd_starts_evenly_in_the_ball_and_in_the_box(box: Any) -> None:
    """Clipped to the box, as the released start is: x′ = clip(x + U(−ε, ε))."""
    target, _ = ours_of(ConvNet)
    (batch,), eps, passes = pictures(64), 0.3, []
    method = pgd(radius=eps, step_size=0.1, steps=1, box=box)
    method.step(target, batch, generator=torch.Generator().manual_seed(0), trace=passes.append)
    start, x = passes[0].deltas["image"], batch["x"]
    assert start.abs().max() <= eps
    free = start[(x > eps) & (x < 1 - eps)]
    assert free.mean().abs() < 0.02
    assert free.std().item() == pytest.approx(eps / math.sqrt(3), rel=0.03)
    if box is not None:
        low = start[x < 0.05]
        assert torch.isclose(low, -x[x < 0.05]).float().mean() > 0.3  # a third and more of the draws are below the box


def shafahi(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    *,
    eps: float,
    replays: int,
    box: Any,
    projected: bool,
) -> Tensor:
    """Free adversarial training; return the noise that is carried on.

    As released: the noise stays in ±ε and x + noise is clamped to the box in the forward pass. `projected`: the noise
    itself is brought into the box of the batch's pictures, before the first pass and after each step.
    """
    noise = torch.zeros(max(len(batch["y"]) for batch in batches), 3, 4, 4, dtype=torch.float64)

    def boxed(x: Tensor, delta: Tensor) -> Tensor:
        return delta if box is None else (x + delta).clamp(*box) - x

    for batch in batches:
        x, y = batch["x"], batch["y"]
        rows = slice(len(y))
        if projected:
            noise[rows] = boxed(x, noise[rows])
        for _ in range(replays):
            leaf = noise[rows].clone().requires_grad_()
            optimizer.zero_grad()
            model(x, y, delta=leaf if projected else boxed(x, leaf))["loss"].backward()
            assert leaf.grad is not None
            noise[rows] = (noise[rows] + eps * leaf.grad.sign()).clamp(-eps, eps)
            if projected:
                noise[rows] = boxed(x, noise[rows])
            optimizer.step()
    return noise


def freely(batches: list[dict[str, Tensor]], *, eps: float, replays: int, box: Any) -> tuple[nn.Module, Tensor]:
    """Train by the recipe."""
    target, optimizer = ours_of(ConvNet)
    state, method = AscentState(), free_at(radius=eps, replays=replays, box=box)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches:
        method.step(target, batch, update=update, state=state)
    return target.model, state.deltas["image"]


@pytest.mark.parametrize("replays", [1, 4])
@pytest.mark.parametrize(
    ("eps", "margin", "box", "projected"),
    [
        pytest.param(0.1, 0.0, None, False, id="released-without-a-box"),
        pytest.param(0.1, 0.1, BOX, False, id="released-inside-the-box"),
        pytest.param(0.3, 0.0, BOX, True, id="into-the-box"),
    ],
)
def test_free_adversarial_training(eps: float, margin: float, box: Any, projected: bool, replays: int) -> None:
    batches = pictures(6, 6, 4, margin=margin)
    theirs, optimizer = made(ConvNet)
    for count in range(1, 4):
        found, carried = freely(batches[:count], eps=eps, replays=replays, box=box)
        theirs, optimizer = made(ConvNet)
        noise = shafahi(theirs, optimizer, batches[:count], eps=eps, replays=replays, box=box, projected=projected)
        agree_on_weights(found, theirs)
        agree(carried, noise[: len(carried)], 1e-9)
    assert (carried.abs() > 0.99 * eps).double().mean() > 0.3


def test_where_the_released_clamp_bites_the_noise_differs() -> None:
    """As docs/methods/free_at.md says: the clamp has no gradient outside of the box, and the noise there stays as it is."""
    batches, options = pictures(6, 6), {"eps": 0.3, "replays": 4, "box": BOX}
    theirs, optimizer = made(ConvNet)
    shafahi(theirs, optimizer, batches, **options, projected=False)
    found, carried = freely(batches, **options)
    assert (batches[-1]["x"] + carried).clamp(*BOX).sub(batches[-1]["x"] + carried).abs().max() < 1e-12
    with pytest.raises(AssertionError, match="differ by"):
        agree_on_weights(found, theirs)
