"""DAT is, in float64, the released step and the paper's, each written out as a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.plain import agree, agree_on_gradients, gradients_of, pixel_net, pixels
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from advvl import PassTrace, Sometimes, Zero, adapt, dat
from advvl.errors import ConfigurationError
from advvl.models.huggingface.pixels import PixelInput

RADIUS, STEP = 0.1, 0.1


def discretise(x: Tensor) -> Tensor:
    """A reconstruction that is not the identity, and whose derivative is zero."""
    return (0.9 * x + 0.07).mul(16).round().div(16).clamp(0, 1)


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def stepped(method: Any, target: Any, batch: Any, seed: int = 3) -> tuple[Any, list[PassTrace]]:
    passes: list[PassTrace] = []
    report = method.step(target, batch, generator=torch.Generator().manual_seed(seed), trace=passes.append)
    return report, passes


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("probability", [0.0, 1.0], ids=["zero start", "random start"])
def test_the_released_step(dropout: float, probability: float, steps: int) -> None:
    """Clean + loss of Q(PGD(Q(x))), the gradient by the reconstruction applied to it, one backward."""
    batch, seed = pixels(), 3
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(7)
    report, _ = stepped(dat(discretise, steps=steps, start_probability=probability), ours, batch, seed)

    torch.manual_seed(7)
    x, y = batch["x"], batch["y"]
    loss = F.cross_entropy(theirs(x)["logits"], y)
    reconstruction = discretise(x)
    adversarial = reconstruction.clone()
    if probability:
        generator = torch.Generator().manual_seed(seed)
        torch.rand((), generator=generator, dtype=torch.float64)  # the coin
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        adversarial = (reconstruction + RADIUS * noise / norms(noise)).clamp(0, 1)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(theirs(adversarial)["logits"], y), adversarial)
        moved = adversarial.detach() + STEP * gradient / norms(gradient) - reconstruction
        adversarial = (reconstruction + moved * (RADIUS / norms(moved)).clamp(max=1)).clamp(0, 1)
    loss = loss + F.cross_entropy(theirs(discretise(adversarial))["logits"], y)
    agree(report.loss, loss.detach(), 1e-9)
    assert report.passes == 2 + steps
    assert not torch.equal(discretise(adversarial), reconstruction)
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_papers_step(dropout: float) -> None:
    """Clean + loss of Q(x + δ), δ along the gradient at Q(x), passed straight through Q to x."""
    batch = pixels()
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(7)
    report, _ = stepped(dat(discretise, perturbed="before", start_probability=0.0), ours, batch)

    torch.manual_seed(7)
    x, y = batch["x"], batch["y"]
    loss = F.cross_entropy(theirs(x)["logits"], y)
    at = discretise(x).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(theirs(at)["logits"], y), at)
    delta = (x + STEP * gradient / norms(gradient)).clamp(0, 1) - x
    loss = loss + F.cross_entropy(theirs(discretise(x + delta))["logits"], y)
    agree(report.loss, loss.detach(), 1e-9)
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


def clip() -> CLIPModel:
    """Reads four patches and four words."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = tower | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    pictures = tower | {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=words, vision_config=pictures, projection_dim=16)).double().eval()


def captioned() -> dict[str, Tensor]:
    """Three pictures with a caption each."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64),
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2], [1, 8, 9, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
    }


def matching(outputs: Any, batch: Any) -> Tensor:
    """The cross-entropy of each picture's own caption among all."""
    return F.cross_entropy(outputs.logits_per_image, torch.arange(len(batch["pixel_values"])), reduction="none")


def test_a_model_of_vision_and_language_is_trained_in_raw_pixels() -> None:
    """The released step on CLIP, which normalises the reconstructed pixels itself."""
    batch, mean, std = captioned(), [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    ours, theirs = PixelInput(clip(), mean, std).double(), clip()
    report, _ = stepped(dat(discretise, start_probability=0.0), adapt(ours, loss=matching), batch)

    def loss(pixels: Tensor) -> Tensor:
        by_channel = [torch.tensor(values).double().reshape(3, 1, 1) for values in (mean, std)]
        normalised = (pixels - by_channel[0]) / by_channel[1]
        return matching(theirs(**{**batch, "pixel_values": normalised}), batch).mean()

    at = discretise(batch["pixel_values"]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    adversarial = (at.detach() + STEP * gradient / norms(gradient)).clamp(0, 1)
    whole = loss(batch["pixel_values"]) + loss(discretise(adversarial))
    agree(report.loss, whole.detach(), 1e-9)
    assert not torch.equal(discretise(adversarial), discretise(batch["pixel_values"]))
    agree_on_gradients(ours.model, gradients_of(whole, theirs))


def test_embedded_patches_are_no_pixels_and_the_way_out_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'image' inside its box \[0, 1\].*wrap the model in PixelInput"):
        dat(lambda x: x).step(adapt(clip(), loss=matching), captioned())


def test_the_two_differ() -> None:
    losses = [
        stepped(dat(discretise, perturbed=how, start_probability=0.0), pixel_net(), pixels())[0].loss
        for how in ("after", "before")
    ]
    assert not torch.equal(*losses)


def test_the_perturbation_is_in_the_ball_before_it_is_discretised_and_the_start_as_long_as_the_radius() -> None:
    report, passes = stepped(dat(discretise, box=None, start_probability=1.0), pixel_net(), pixels())
    start, end = (seen.deltas["image"] for seen in passes if seen.modalities)
    agree(norms(start), torch.full((4, 1, 1, 1), RADIUS, dtype=torch.float64))
    assert bool((norms(end) <= RADIUS).all())
    agree(report.delta_norms["image"], norms(end).flatten())


def test_a_batch_is_reconstructed_once_and_its_perturbation_once() -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.clone())
        return discretise(x)

    method, target = dat(counted, start_probability=1.0), pixel_net()
    batch = pixels()
    stepped(method, target, batch)
    assert len(calls) == 2
    assert torch.equal(calls[0], batch["x"])
    batch["x"].mul_(0.5)  # in place: the same memory, another batch
    stepped(method, target, batch)
    assert len(calls) == 4
    assert torch.equal(calls[2], batch["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": "0.1"}, "radius to be a finite number of 0 or more, got '0.1'"),
        ({"radius": float("inf")}, "radius to be a finite number of 0 or more, got inf"),
        ({"radius": -0.1}, "radius to be a finite number of 0 or more, got -0.1"),
        ({"modality": 3}, "modality to be a text, got 3"),
        ({"modality": ""}, "modality"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        dat(discretise, **options)


def test_four_of_five_batches_start_at_random() -> None:
    method, target = dat(discretise), pixel_net()
    starts = [stepped(method, target, pixels(), seed)[1][1].deltas["image"] for seed in range(60)]
    assert 40 < sum(bool(start.any()) for start in starts) < 56
    start = method.perturber.starts()["image"]
    assert isinstance(start, Sometimes)
    assert start.probability == 0.8
    assert not isinstance(start, Zero)
