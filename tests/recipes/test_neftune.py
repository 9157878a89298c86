"""NEFTune is a plain step under noise in ±alpha/√(length·D), the length being that of the sample's real positions."""

from __future__ import annotations

import pytest
import torch
from support.toy import gradients, toy, toy_batch
from torch.nn import functional as F

from advvl import L2, Place
from advvl.recipes import neftune


def test_neftune_is_as_published() -> None:
    """A transcription of `train.py`'s noise, in fp64: losses and the gradient of every parameter."""
    target, batch = toy(), toy_batch()
    report = neftune(alpha=5.0).step(target, batch, generator=torch.Generator().manual_seed(7))
    ours = gradients(target)
    assert report.passes == 1

    model = toy().model
    embedded = model.words(batch["ids"])
    noise = 2 * torch.rand(embedded.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) - 1
    lengths = batch["mask"].sum(1).double()  # fp32 in the published code, whose root of a whole number is fp32
    noise = noise * batch["mask"].unsqueeze(2) * (5.0 / torch.sqrt(lengths * embedded.size(-1))).view(-1, 1, 1)
    tokens = torch.cat([embedded + noise, model.project(batch["regions"])], 1)
    hidden = torch.tanh(model.mix(tokens))
    mask = torch.cat([batch["mask"], batch["region_mask"]], 1)
    scores = model.query(hidden).squeeze(-1).masked_fill(~mask, -torch.inf)
    loss = F.cross_entropy(model.head((scores.softmax(1).unsqueeze(-1) * hidden).sum(1)), batch["labels"])
    loss.backward()
    torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-12, atol=0.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.1, 5.0, 15.0])
def test_the_noise_depends_on_the_real_length_alone(alpha: float) -> None:
    ascent = neftune(alpha).perturber.ascents["text"]  # type: ignore[attr-defined]
    mask = torch.arange(9) < torch.tensor([[9], [3]])
    width = ascent.ball.spread(alpha, Place(torch.zeros(2, 9, 4), mask)).flatten()
    torch.testing.assert_close(width, alpha / (torch.tensor([9.0, 3.0]) * 4).sqrt())
    assert ascent.ball == L2()


def test_neftune_may_disturb_another_modality() -> None:
    assert neftune(1.0, modality="image").perturber.modalities == ("image",)
