"""TRADES, VAT, SMART, FARE and TeCoA are, in float64, the published objectives written out as plain loops.

The loops take a perturbation as an argument of the model and differentiate by `torch.autograd.grad`; only the random start
is read off the library's own first pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loops import agree_on_deltas, climbed, drifted, kl, l2, length, linf, stepped, symmetric, token_linf
from support.plain import agree, agree_on_gradients, gradients_of, pixel_net, pixels, word_net, words
from torch import Tensor

from advvl import Averaged, fare, smart, tecoa, trades, vat


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("norm", "radius", "step_size", "box"),
    [("linf", 0.1, 0.03, None), ("linf", 0.3, 0.1, (0.0, 1.0)), ("l2", 0.5, 0.2, None)],
)
def test_trades(norm: Any, radius: float, step_size: float, box: Any, dropout: float) -> None:
    """The task loss of clean inputs + β KL(clean‖perturbed), whose gradient flows into both branches."""
    batch, beta, steps = pixels(), 6.0, 4
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(7)
    method = trades(radius=radius, step_size=step_size, steps=steps, beta=beta, norm=norm, box=box)
    passes = stepped(method, ours, batch)

    torch.manual_seed(7)
    x, start = batch["x"], passes[0].deltas["image"]
    natural = theirs(**batch)
    move = (
        l2(step_size=step_size, radius=radius) if norm == "l2" else linf(x, step_size=step_size, radius=radius, box=box)
    )
    fixed = natural["logits"].detach()
    deltas = climbed(start, lambda delta: kl(fixed, theirs(x, delta=delta)["logits"]), move, steps)
    loss = natural["loss"] + beta * kl(natural["logits"], theirs(x, delta=deltas[-1])["logits"])

    # in fp64 the gradient of a divergence at a distance of 1e-3 holds about 1e-12 of its size
    assert len(passes) == len(deltas)
    for seen, delta in zip(passes, deltas, strict=True):
        agree(seen.deltas["image"], delta, 1e-12 if norm == "linf" else 1e-10)
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


@pytest.mark.parametrize("task_weight", [1.0, 0.0], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_vat(dropout: float, task_weight: float) -> None:
    """r = ε g/‖g‖ from one short random direction; KL(clean‖perturbed) with the clean side held; the masks are shared."""
    batch, radius, weight, seed = pixels(), 0.7, 1.5, 7
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(seed)
    method = vat(radius=radius, xi=0.05, weight=weight, task_weight=task_weight)
    given = batch if task_weight else {"x": batch["x"]}
    passes = stepped(method, ours, given)

    start = passes[0].deltas["image"]

    def run(delta: Tensor | None = None) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return theirs(**batch, delta=delta)

    natural = run()
    fixed = natural["logits"].detach()

    def replaced(delta: Tensor, gradient: Tensor) -> Tensor:
        return radius * gradient / length(gradient)

    deltas = climbed(start, lambda delta: kl(fixed, run(delta)["logits"]), replaced, steps=1)
    agree_on_deltas(passes, "image", deltas)
    loss = task_weight * natural["loss"] + weight * kl(fixed, run(deltas[-1])["logits"])
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


def test_vats_direction_is_short_and_its_perturbation_as_long_as_the_radius() -> None:
    passes = stepped(vat(radius=3.0, xi=0.01), pixel_net(), pixels(rows=64))
    assert passes[0].deltas["image"].std().item() == pytest.approx(0.01, rel=0.05)
    agree(length(passes[1].deltas["image"]), torch.full((64, 1, 1, 1), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("proximal", [False, True], ids=["alone", "bregman"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_smart(dropout: float, proximal: bool, steps: int) -> None:
    """Task + λ SymKL(f(x), f(x + δ)) + μ SymKL(f(x), f̃(x)), with the average f̃ in eval mode; δ climbs the first SymKL."""
    batch, weight, weight_of_average = words(), 3.0, 2.0
    radius, step_size = 0.4, 0.3
    ours, theirs = word_net(dropout=dropout), word_net(dropout=dropout).model
    average = Averaged(ours.model, decay=0.9)
    with torch.no_grad():
        for model in (ours.model, theirs):
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    torch.manual_seed(7)
    method = smart(
        radius=radius,
        step_size=step_size,
        steps=steps,
        weight=weight,
        bregman=average if proximal else None,
        bregman_weight=weight_of_average,
    )
    passes = stepped(method, ours, batch)

    torch.manual_seed(7)
    start = passes[0].deltas["text"]
    assert not start[~batch["mask"]].any()
    natural = theirs(**batch)
    fixed = natural["logits"].detach()
    deltas = climbed(
        start,
        lambda delta: symmetric(fixed, theirs(**batch, delta=delta)["logits"]),
        lambda delta, gradient: token_linf(delta, gradient, batch["mask"], step_size, radius),
        steps,
    )
    agree_on_deltas(passes, "text", deltas)
    loss = natural["loss"] + weight * symmetric(natural["logits"], theirs(**batch, delta=deltas[-1])["logits"])
    if proximal:
        teacher = word_net().model.eval()  # the weights that the average was begun with
        loss = loss + weight_of_average * symmetric(natural["logits"], teacher(**batch)["logits"].detach())
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


def test_smarts_perturbation_is_no_longer_than_the_published_radius() -> None:
    passes = stepped(smart(), word_net(), words())
    assert [seen.deltas["text"].abs().max().item() for seen in passes] == [pytest.approx(1e-5)] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_fare(box: Any, dropout: float) -> None:
    """The mean over rows of Σ (φ(x + δ) − φ₀(x))², climbed and taught; φ₀ is frozen, in eval mode; no labels."""
    batch, radius, step_size, steps = {"x": pixels()["x"]}, 0.2, 0.06, 4
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout)
    method = fare(
        ours.model, radius=radius, step_size=step_size, steps=steps, reads=lambda out: out["features"], box=box
    )
    original = theirs.model.eval()(**batch)["features"].detach()
    theirs.model.train()
    drifted(ours)
    drifted(theirs)
    torch.manual_seed(7)
    passes = stepped(method, ours, batch)

    torch.manual_seed(7)
    x, start = batch["x"], passes[0].deltas["image"]

    def distance(delta: Tensor) -> Tensor:
        return (theirs.model(x, delta=delta)["features"] - original).square().sum(1).mean()

    deltas = climbed(start, distance, linf(x, step_size=step_size, radius=radius, box=box), steps)
    agree_on_deltas(passes, "image", deltas)
    agree_on_gradients(ours.model, gradients_of(distance(deltas[-1]), theirs.model))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_tecoa(box: Any, dropout: float) -> None:
    """The mean cross-entropy of 100 cos(φ(x + δ), t) at fixed embeddings t, which need not be normalised."""
    batch, radius, step_size, steps = pixels(), 0.2, 0.06, 4
    texts = torch.randn(7, 16, dtype=torch.float64)
    ours = pixel_net(dropout=dropout, call=lambda model, batch: model(batch["x"]))
    theirs = pixel_net(dropout=dropout).model
    labelled = {"x": batch["x"], "labels": batch["y"]}
    torch.manual_seed(7)
    method = tecoa(texts, radius=radius, step_size=step_size, steps=steps, reads=lambda out: out["features"], box=box)
    passes = stepped(method, ours, labelled)

    torch.manual_seed(7)
    x, y, start = batch["x"], batch["y"], passes[0].deltas["image"]

    def objective(delta: Tensor) -> Tensor:
        features = theirs(x, delta=delta)["features"]
        logits = 100 * (features / features.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T
        return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()

    deltas = climbed(start, objective, linf(x, step_size=step_size, radius=radius, box=box), steps)
    agree_on_deltas(passes, "image", deltas)
    agree_on_gradients(ours.model, gradients_of(objective(deltas[-1]), theirs))
