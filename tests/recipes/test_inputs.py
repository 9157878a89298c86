"""FGM, FGSM-RS, ALUM, R-Drop, AGFT, PMG-AFT and modality interference are, in float64, the objectives written out.

The loops take a perturbation as an argument of the model and differentiate by `torch.autograd.grad`; only random starts
are read off the library's own passes.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.loops import agree_on_deltas, climbed, drifted, kl, length, linf, stepped, symmetric, token_linf
from support.plain import agree, agree_on_gradients, gradients_of, pixel_net, pixels, word_net, words
from support.toy import toy, toy_batch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import Adapter, AdapterOff, Frozen, Site
from advvl.errors import ConfigurationError
from advvl.recipes import agft, alum, fare, fgm, fgsm_rs, modality_interference, pmg_aft, r_drop

DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.3])


@DROPOUTS
def test_fgm(dropout: float) -> None:
    """The mean of the clean loss and of that at ε g/‖g‖, one norm per row."""
    batch, radius = words(), 0.7
    ours, theirs = word_net(dropout=dropout), word_net(dropout=dropout).model
    torch.manual_seed(7)
    passes = stepped(fgm(radius), ours, batch)

    torch.manual_seed(7)
    zero = torch.zeros(4, 5, 6, dtype=torch.float64, requires_grad=True)
    clean = theirs(**batch, delta=zero)["loss"]
    (gradient,) = torch.autograd.grad(clean, zero, retain_graph=True)
    gradient = gradient * batch["mask"].unsqueeze(-1)
    delta = radius * gradient / length(gradient)
    agree_on_deltas(passes, "text", [zero.detach(), delta])
    loss = (clean + theirs(**batch, delta=delta)["loss"]) / 2
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


@DROPOUTS
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("step_size", [None, 0.05])
def test_fgsm_rs(step_size: float | None, box: Any, dropout: float) -> None:
    """One sign step of 1.25 radii from a uniform start, into the ball and the box; its loss alone is taught."""
    batch, radius = pixels(), 0.2
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(7)
    passes = stepped(fgsm_rs(radius=radius, step_size=step_size, box=box), ours, batch)

    torch.manual_seed(7)
    start = passes[0].deltas["image"]
    assert radius * 0.9 < start.abs().max() <= radius
    move = linf(batch["x"], step_size=step_size or 1.25 * radius, radius=radius, box=box)
    deltas = climbed(start, lambda delta: theirs(**batch, delta=delta)["loss"], move, 1)
    agree_on_deltas(passes, "image", deltas)
    agree_on_gradients(ours.model, gradients_of(theirs(**batch, delta=deltas[-1])["loss"], theirs))


@DROPOUTS
@pytest.mark.parametrize("steps", [1, 2])
def test_alum(steps: int, dropout: float) -> None:
    """The clean loss + α KL(clean‖perturbed) into both; δ climbs the KL, with Linf per token."""
    batch, weight, radius, step_size = words(), 3.0, 0.4, 0.3
    ours, theirs = word_net(dropout=dropout), word_net(dropout=dropout).model
    torch.manual_seed(7)
    passes = stepped(alum(radius=radius, step_size=step_size, steps=steps, weight=weight), ours, batch)

    torch.manual_seed(7)
    natural = theirs(**batch)
    fixed = natural["logits"].detach()
    deltas = climbed(
        passes[0].deltas["text"],
        lambda delta: kl(fixed, theirs(**batch, delta=delta)["logits"]),
        lambda delta, gradient: token_linf(delta, gradient, batch["mask"], step_size, radius),
        steps,
    )
    agree_on_deltas(passes, "text", deltas)
    loss = natural["loss"] + weight * kl(natural["logits"], theirs(**batch, delta=deltas[-1])["logits"])
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


def test_r_drop() -> None:
    """Both passes' losses + α/2 of the symmetric KL between them; they differ by their masks."""
    batch, alpha = words(), 3.0
    ours, theirs = word_net(dropout=0.3), word_net(dropout=0.3).model
    torch.manual_seed(7)
    report = r_drop(alpha).step(ours, batch)

    torch.manual_seed(7)
    first, second = theirs(**batch), theirs(**batch)
    assert not torch.equal(first["logits"], second["logits"])
    penalty = symmetric(first["logits"], second["logits"])
    loss = first["loss"] + second["loss"] + alpha / 2 * penalty
    agree(report.loss, loss.detach())
    agree_on_gradients(ours.model, gradients_of(loss, theirs))
    assert (report.passes, report.rows) == (2, {})


def cosines(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    return scale * (features / features.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T


@DROPOUTS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_agft(temperature: float, dropout: float) -> None:
    """KL of p(x + δ) from the original model's prediction at a temperature, climbed and taught, without labels."""
    batch, radius, step_size, scale = {"x": pixels()["x"]}, 0.2, 0.06, 10.0
    texts = torch.randn(7, 16, dtype=torch.float64)
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout)
    method = agft(
        ours.model,
        texts,
        radius=radius,
        step_size=step_size,
        temperature=temperature,
        steps=3,
        scale=scale,
        reads=lambda out: out["features"],
    )
    original = cosines(theirs.model.eval()(**batch)["features"].detach(), texts, scale) / temperature
    theirs.model.train()
    drifted(ours)
    drifted(theirs)
    torch.manual_seed(7)
    passes = stepped(method, ours, batch)

    torch.manual_seed(7)
    x = batch["x"]

    def objective(delta: Tensor) -> Tensor:
        return kl(original, cosines(theirs.model(x, delta=delta)["features"], texts, scale))

    move = linf(x, step_size=step_size, radius=radius, box=(0.0, 1.0))
    deltas = climbed(passes[0].deltas["image"], objective, move, 3)
    agree_on_deltas(passes, "image", deltas)
    agree_on_gradients(ours.model, gradients_of(objective(deltas[-1]), theirs.model))


@DROPOUTS
def test_pmg_aft(dropout: float) -> None:
    """CE(x + δ) + α KL(p₀(x)‖p(x + δ)) + β KL(p(x)‖p(x + δ)), the last into both branches; the CE alone is climbed."""
    given, radius, step_size, scale, alpha, beta = pixels(), 0.2, 0.06, 10.0, 0.7, 1.3
    texts = torch.randn(7, 16, dtype=torch.float64)
    ours = pixel_net(dropout=dropout, call=lambda model, batch: model(batch["x"]))
    theirs = pixel_net(dropout=dropout)
    method = pmg_aft(
        ours.model,
        texts,
        radius=radius,
        step_size=step_size,
        alpha=alpha,
        beta=beta,
        scale=scale,
        reads=lambda out: out["features"],
    )
    x, y = given["x"], given["y"]
    original = cosines(theirs.model.eval()(x)["features"].detach(), texts, scale)
    theirs.model.train()
    drifted(ours)
    drifted(theirs)
    torch.manual_seed(7)
    passes = stepped(method, ours, {"x": x, "labels": y})

    torch.manual_seed(7)

    def logits(delta: Tensor | None = None) -> Tensor:
        return cosines(theirs.model(x, delta=delta)["features"], texts, scale)

    def task(found: Tensor) -> Tensor:
        return -found.log_softmax(1)[torch.arange(len(y)), y].mean()

    clean = logits()
    move = linf(x, step_size=step_size, radius=radius, box=(0.0, 1.0))
    deltas = climbed(passes[0].deltas["image"], lambda delta: task(logits(delta)), move, 2)
    agree_on_deltas(passes, "image", deltas)
    found = logits(deltas[-1])
    loss = task(found) + alpha * kl(original, found) + beta * kl(clean, found)
    agree_on_gradients(ours.model, gradients_of(loss, theirs.model))


ORIGINALS: dict[str, Any] = {
    "fare": fare,
    "agft": lambda model, **options: agft(model, torch.eye(5, 16), temperature=2.0, **options),
    "pmg_aft": lambda model, **options: pmg_aft(model, torch.eye(5, 16), **options),
}


@pytest.mark.parametrize("recipe", ORIGINALS.values(), ids=ORIGINALS)
def test_with_an_adapter_the_original_model_needs_no_second_copy(recipe: Any) -> None:
    """Its outputs are those of the model with the adapter off; a copy of them gives the same gradients."""
    batch = {"x": pixels()["x"], "labels": pixels()["y"]}
    options = {"radius": 0.2, "step_size": 0.06, "steps": 2, "reads": lambda out: out["features"]}
    found = []
    for reference in (AdapterOff(), Frozen.copy_of(pixel_net().model)):
        tuned = get_peft_model(pixel_net().model, LoraConfig(r=2, target_modules=["mix"], init_lora_weights=False))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) if "lora" in name else 0)
        own = set(map(id, tuned.parameters()))
        target = Adapter(tuned, {"image": Site("patches", at="input")}, call=lambda model, batch: model(batch["x"]))
        before = {id(one) for one in gc.get_objects() if type(one) is nn.Parameter}
        method = recipe(tuned, **options, reference=reference)
        assert before == {id(one) for one in gc.get_objects() if type(one) is nn.Parameter} >= own
        torch.manual_seed(7)
        report = method.step(target, batch)
        assert report.regularization > 0
        found.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
    for name, gradient in found[1].items():
        agree(found[0][name], gradient)


def test_modality_interference() -> None:
    """L(x) + L(x + δ) + λ JS, into both branches; in each row only the modality that its mask leaves may move."""
    batch, weight, radius, step_size, steps = toy_batch(), 2.0, 0.4, 0.3, 2
    batch["mask"][0] = False  # the first row needs its words, the others their regions
    batch["region_mask"][1:] = False
    ours, theirs = toy(), toy().model
    method = modality_interference(("text", "image"), radius=radius, step_size=step_size, steps=steps, weight=weight)
    everything = {"mask": torch.ones(3, 5, dtype=torch.bool), "region_mask": torch.ones(3, 4, dtype=torch.bool)}
    ours.call = lambda model, given: model(**{**given, **everything})
    passes = stepped(method, ours, batch)

    def run(text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([theirs.words(batch["ids"]) + text, theirs.project(batch["regions"] + image)], 1)
        hidden = torch.tanh(theirs.mix(tokens))
        logits = theirs.head((theirs.query(hidden).softmax(1) * hidden).sum(1))
        return logits, F.cross_entropy(logits, batch["labels"])

    text, image = torch.zeros(3, 5, 8, dtype=torch.float64), torch.zeros(3, 4, 5, dtype=torch.float64)
    clean, clean_task = run(text, image)
    for seen in passes[:-1]:
        agree_on_deltas([seen], "text", [text])
        leaves = text.clone().requires_grad_(), image.clone().requires_grad_()
        gradients = torch.autograd.grad(run(*leaves)[1], leaves)
        masks = batch["mask"].unsqueeze(-1), batch["region_mask"].unsqueeze(-1)
        text, image = (
            ((delta + step_size * gradient.sign()) * mask).clamp(-radius, radius)
            for delta, gradient, mask in zip((text, image), gradients, masks, strict=True)
        )
    agree_on_deltas(passes[-1:], "text", [text])
    agree_on_deltas(passes[-1:], "image", [image])
    assert not text[0].any()
    assert not image[1:].any()
    logits, task = run(text, image)
    p, q = clean.softmax(1), logits.softmax(1)
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)).mean() / 2
    agree_on_gradients(ours.model, gradients_of(clean_task + task + weight * js, theirs))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), "hot"])
def test_a_temperature_that_is_none_is_refused(temperature: Any) -> None:
    with pytest.raises(ConfigurationError, match="finite temperature above 0"):
        agft(pixel_net().model, torch.eye(3), radius=0.1, step_size=0.1, temperature=temperature)
