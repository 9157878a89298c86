"""Training against modality interference, on models that read image tokens among words: LLaVA and Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.hf_families import FAMILIES, IMAGE
from support.plain import agree, agree_on_gradients, gradients_of
from torch import Tensor
from torch.nn import functional as F

from advvl import PassTrace, Site, adapt
from advvl.adapters.injection import Batch
from advvl.recipes import modality_interference


def task(outputs: Any, batch: Batch) -> Tensor:
    """The cross-entropy of the next word, in float64."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def unneeded(text: Site, image: Site) -> dict[str, Site]:
    """The sites whose masks leave the modality that a row does not need."""
    assert text.mask is not None
    assert image.rows is not None
    of_words, sample_of = text.mask, image.rows

    def image_moves(batch: Batch) -> Tensor:
        samples = sample_of(batch)
        assert samples is not None
        return ~batch["needs_image"][samples]  # one entry per packed token of Qwen-VL, per picture of LLaVA

    return {
        "text": replace(text, mask=lambda batch: of_words(batch).bool() & batch["needs_image"][:, None]),
        "image_tokens": replace(image, mask=image_moves),
    }


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2.5-VL"])
def test_a_row_is_perturbed_in_the_modality_that_it_does_not_need(name: str) -> None:
    """L(x) + L(x + δ) + λ JS, in float64, with the sample of each image token counted by hand."""
    family = next(family for family in FAMILIES if family.name == name)
    batch, weight, radius, step_size = family.fields(), 2.0, 0.05, 0.04
    needs = torch.tensor([True, False])  # the first row needs its picture, the second its words
    known = adapt(family.model()).sites
    sites = unneeded(known["text"], known["image_tokens"])
    target = adapt(
        family.model(),
        sites,
        call=lambda model, given: model(**{name: value for name, value in given.items() if name != "needs_image"}),
        loss=task,
    )
    trace: list[PassTrace] = []
    method = modality_interference(radius=radius, step_size=step_size, weight=weight)
    report = method.step(target, {**batch, "needs_image": needs}, trace=trace.append)
    assert report.delta_norms["text"].nonzero().flatten().tolist() == [0]
    assert report.delta_norms["image_tokens"].nonzero().flatten().tolist() == [1]

    model, ids = family.model(), batch["input_ids"]
    modules = {modality: model.get_submodule(site.module) for modality, site in sites.items()}
    of_tokens = torch.arange(2).repeat_interleave((ids == IMAGE).sum(1))

    def run(deltas: dict[str, Tensor | None]) -> tuple[Any, Tensor]:
        handles = [
            modules[modality].register_forward_hook(
                lambda module, args, x, delta=delta: x if delta is None else x + delta
            )
            for modality, delta in deltas.items()
        ]
        outputs = model(**batch)
        for handle in handles:
            handle.remove()
        return outputs.logits, task(outputs, batch)

    shapes: dict[str, torch.Size] = {}
    for modality, module in modules.items():
        keep = module.register_forward_hook(lambda module, args, x, name=modality: shapes.update({name: x.shape}))
        model(**batch)
        keep.remove()
    leaves = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    gradients = torch.autograd.grad(run(leaves)[1], list(leaves.values()))
    masks = {
        "text": (known["text"].mask(batch).bool() & needs[:, None]),  # type: ignore[misc]
        "image_tokens": ~needs[of_tokens].view(shapes["image_tokens"][:-1]),
    }
    deltas: dict[str, Tensor | None] = {
        name: step_size * gradient.sign() * masks[name].unsqueeze(-1)
        for name, gradient in zip(leaves, gradients, strict=True)
    }
    for name, delta in deltas.items():
        agree(trace[-1].deltas[name], delta)

    clean, clean_task = run(dict.fromkeys(deltas))
    logits, perturbed_task = run(deltas)
    counted = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
    p, q = clean[counted].softmax(1), logits[counted].softmax(1)
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)).mean() / 2
    agree_on_gradients(target.model, gradients_of(clean_task + perturbed_task + weight * js, model))
