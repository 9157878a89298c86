"""Raw pixels as input: FARE and TeCoA on CLIP, in float64, are the published loops on a tower that is normalised by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.plain import agree, agree_on_gradients, gradients_of
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ViltConfig,
    ViltForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
)

from advvl import L2, PGD, Ascent, Attack, EmbeddingPerturber, Linf, PassTrace, Site, Uniform, adapt, fare, tecoa
from advvl.errors import ConfigurationError
from advvl.models.huggingface.pixels import PixelInput

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 6,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "projection_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Phi = Callable[[nn.Module, Tensor], Tensor]


def tower(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "CLIPModel":
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)).double()
    cls = {"CLIPVisionModel": CLIPVisionModel, "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection}[kind]
    return cls(CLIPVisionConfig(**VISION)).double()


def by_hand(model: nn.Module, pixels: Tensor) -> Tensor:
    """The embedding of raw pixels, unnormalised, from the tower without `PixelInput`."""
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    normalised = (pixels - mean) / std
    if isinstance(model, CLIPModel):
        return model.visual_projection(model.vision_model(pixel_values=normalised).pooler_output)
    outputs = model(pixel_values=normalised)
    return outputs.image_embeds if "image_embeds" in outputs else outputs.pooler_output


def batch(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    if kind != "CLIPModel":
        return {"pixel_values": pixels}
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2], [1, 8, 9, 2]])
    return {"input_ids": ids, "pixel_values": pixels}


def reads(kind: str) -> dict[str, Any]:
    """CLIPModel gives its embeddings normalised: what FARE needs is the output of the projection."""
    return {"reads": "model.visual_projection"} if kind == "CLIPModel" else {}


def climb(start: Tensor, pixels: Tensor, objective: Callable[[Tensor], Tensor], radius: float, step: float, n: int):
    deltas = [start]
    for _ in range(n):
        leaf = deltas[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(pixels + leaf), leaf)
        delta = (leaf.detach() + step * gradient.sign()).clamp(-radius, radius)
        deltas.append((pixels + delta).clamp(0, 1) - pixels)
    return deltas


KINDS = ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"]


@pytest.mark.parametrize("kind", KINDS)
def test_fare_on_raw_pixels(kind: str) -> None:
    given, radius, step, steps = batch(kind), 8 / 255, 3 / 255, 3
    ours, theirs = PixelInput(tower(kind), MEAN, STD).double(), tower(kind)
    method = fare(ours, radius=radius, step_size=step, steps=steps, **reads(kind))
    original = by_hand(theirs, given["pixel_values"]).detach()
    for model in (ours.model, theirs):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    passes: list[PassTrace] = []
    method.step(adapt(ours), given, trace=passes.append)

    def distance(pixels: Tensor) -> Tensor:
        return (by_hand(theirs, pixels) - original).square().sum(1).mean()

    deltas = climb(passes[0].deltas["image"], given["pixel_values"], distance, radius, step, steps)
    assert len(passes) == len(deltas)
    for seen, delta in zip(passes, deltas, strict=True):
        agree(seen.deltas["image"], delta)
    agree_on_gradients(ours.model, gradients_of(distance(given["pixel_values"] + deltas[-1]), theirs))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tecoa_on_raw_pixels(kind: str) -> None:
    given, radius, step, steps = batch(kind), 8 / 255, 3 / 255, 3
    labels = torch.tensor([0, 2, 1])
    ours, theirs = PixelInput(tower(kind), MEAN, STD).double(), tower(kind)
    texts = torch.randn(4, 16 if kind == "CLIPVisionModel" else 6, dtype=torch.float64)
    method = tecoa(texts, radius=radius, step_size=step, steps=steps)
    passes: list[PassTrace] = []
    method.step(adapt(ours), given | {"labels": labels}, trace=passes.append)

    def objective(pixels: Tensor) -> Tensor:
        logits = 100 * unit(by_hand(theirs, pixels)) @ unit(texts).T
        return -logits.log_softmax(1)[torch.arange(3), labels].mean()

    deltas = climb(passes[0].deltas["image"], given["pixel_values"], objective, radius, step, steps)
    for seen, delta in zip(passes, deltas, strict=True):
        agree(seen.deltas["image"], delta)
    agree_on_gradients(ours.model, gradients_of(objective(given["pixel_values"] + deltas[-1]), theirs))


def test_pixels_are_normalised_as_the_image_processor_would() -> None:
    processor = SimpleNamespace(image_mean=MEAN, image_std=STD)
    inside, given = tower("CLIPVisionModel"), batch("CLIPVisionModel")["pixel_values"]
    for one in (processor, SimpleNamespace(image_processor=processor)):
        outputs = PixelInput.like(one, inside).double()(given)
        agree(outputs.pooler_output, by_hand(inside, given))
    assert PixelInput(inside, MEAN, STD).state_dict().keys() == {f"model.{name}" for name in inside.state_dict()}


def test_other_modalities_of_the_model_stay() -> None:
    target = adapt(PixelInput(tower("CLIPModel"), MEAN, STD))
    assert target.sites["image"] == Site("normalize", at="input")
    assert target.sites["text"].module == "model.text_model.embeddings.token_embedding"


def test_an_attack_on_a_classifier_stays_in_the_ball_and_the_box_of_its_pixels() -> None:
    model = PixelInput(ViTForImageClassification(ViTConfig(**VISION, num_labels=3)), [0.5] * 3, [0.5] * 3)
    given = {"pixel_values": torch.rand(4, 3, 8, 8).round(decimals=1), "labels": torch.tensor([0, 1, 2, 0])}
    ascent = Ascent(Linf(0.05), step_size=0.02, rule="sign", box=(0, 1))
    found = Attack(EmbeddingPerturber(image=ascent), PGD(4))(adapt(model), given)
    perturbed = given["pixel_values"] + found.deltas["image"]
    assert found.deltas["image"].abs().max().item() == pytest.approx(0.05)
    assert perturbed.min() >= 0
    assert perturbed.max() <= 1


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5, 0.5), (0.5, 0.0))])
def test_a_mean_and_deviation_that_cannot_normalise_are_refused(mean: Any, std: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a mean and a standard deviation above 0 for each channel"):
        PixelInput(nn.Identity(), mean, std)


def test_a_model_of_another_library_has_its_pixels_alone() -> None:
    class Flat(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.flatten(1)

    assert set(adapt(PixelInput(Flat(), MEAN, STD)).sites) == {"image"}


def test_padded_pixels_stay_zero() -> None:
    sizes = {name: VISION[name] for name in VISION if name != "projection_dim"}
    torch.manual_seed(0)
    model = PixelInput(ViltForQuestionAnswering(ViltConfig(**sizes, vocab_size=20, num_labels=3)), [0.5] * 3, [0.5] * 3)
    mask = torch.ones(2, 8, 8, dtype=torch.long)
    mask[1, 4:] = 0
    given = {
        "input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]]),
        "pixel_values": torch.rand(2, 3, 8, 8) * mask[:, None],
        "labels": torch.eye(3)[:2],
    }
    ascent = EmbeddingPerturber(image=Ascent(L2(0.5), step_size=0.3, start=Uniform(0.5)))
    found = Attack(ascent, PGD(2))(adapt(model), given | {"pixel_mask": mask}).deltas["image"]
    assert not found[1, :, 4:].any()
    assert found[1, :, :4].all()
    assert Attack(ascent, PGD(2))(adapt(model), given).deltas["image"].all()  # without a mask all pixels are real
