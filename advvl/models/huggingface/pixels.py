"""Raw pixels as a model's input, normalised inside it, so that a ball and a box are in pixels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from advvl.adapters.base import Adapter
from advvl.adapters.injection import Site
from advvl.adapters.outputs import Outputs
from advvl.errors import ConfigurationError
from advvl.models.huggingface import fields
from advvl.models.huggingface.adapter import huggingface_adapter
from advvl.perturbers.pixels import Normalised
from advvl.runtime.names import unwrapped


class Normalize(nn.Module):
    """Pixels minus the mean of their channel, divided by its standard deviation.

    Arguments:
        mean, std: of each channel `(C,)`, in the units of the pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(deviation > 0 for deviation in std):
            raise ConfigurationError(
                f"expected a mean and a standard deviation above 0 for each channel, got {list(mean)} and {list(std)}"
            )
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class PixelInput(nn.Module):
    """A model of transformers that takes raw pixels in [0, 1] as `pixel_values` and normalises them itself.

    `adapt` perturbs its raw pixels as "image". Save the weights of `.model`.

    Arguments:
        model: takes normalised `pixel_values` `(B, C, H, W)`, such as a CLIPVisionModel.
        mean, std: of each channel of the raw pixels, as its image processor has them.

    Raises:
        ConfigurationError: a mean and a deviation that are not one for each channel, or a deviation of 0.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.model = model

    @classmethod
    def like(cls, processor: Any, model: nn.Module) -> PixelInput:
        """Normalise as an image processor does; the input is then `processor(images, do_normalize=False)`.

        Raises:
            ConfigurationError: a processor that does not normalise.
        """
        normalised = Normalised.of(processor)
        return cls(model, normalised.mean, normalised.std)

    def forward(self, pixel_values: Tensor, **inputs: Any) -> Outputs:
        return self.model(pixel_values=self.normalize(pixel_values), **inputs)


def pixel_adapter(model: nn.Module) -> Adapter:
    """The adapter of a `PixelInput`, wrapped or not: "image" is its raw pixels, other modalities are those of its model."""
    outer = next(part for part in model.modules() if isinstance(part, PixelInput))
    if not any(isinstance(part, PreTrainedModel) for part in outer.model.modules()):
        return Adapter(model, {"image": Site("normalize", at="input")})
    inner = huggingface_adapter(outer.model)
    inner.close()
    sites = {modality: replace(site, module=f"model.{site.module}") for modality, site in inner.sites.items()}
    patches = sites.get("image", Site(""))
    taken = inspect.signature(unwrapped(outer.model).forward).parameters
    name = next((name for name in ("pixel_attention_mask", "pixel_mask") if name in taken), None)
    mask = None if name is None else partial(fields.pixel_mask, name=name)
    sites["image"] = Site("normalize", at="input", mask=mask, rows=patches.rows, examples=patches.examples)
    return Adapter(model, sites, call=inner.call, logits=inner.logits, positions=inner.positions)
