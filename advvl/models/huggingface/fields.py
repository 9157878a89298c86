"""Read off a batch which positions are real, which sample a packed row is of, and which predictions count.

The names are those that transformers' processors give, and the defaults those that its models take.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextModel, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from advvl.adapters.injection import Batch
from advvl.errors import ConfigurationError, SiteError, more


def placeholders(config: PreTrainedConfig) -> frozenset[int]:
    """The ids of tokens whose embedding the model replaces by that of an image or a video."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return frozenset(token for token in found if isinstance(token, int))


def text_mask(batch: Batch, *, void: Collection[int] = ()) -> Tensor:
    """The real words, `(B, T)`, or `(B·C, T)` of C choices: all attended to, but tokens whose embedding is replaced."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return (real & ~_among(ids, void)).flatten(0, -2)


def text_mask_to_the_end(batch: Batch, *, void: Collection[int] = ()) -> Tensor:
    """The same, and the last position: SigLIP reads the text there, padded or not."""
    mask = text_mask(batch, void=void)
    return mask | (torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1)


def region_mask(projection: nn.Module, batch: Batch) -> Tensor:
    """The real regions, `(B, R)`, or `(B·C, R)` of C choices: all but padding."""
    del projection
    mask = batch.get("visual_attention_mask")
    real = torch.ones(batch["visual_embeds"].shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    return real.flatten(0, -2)


def choices(batch: Batch) -> Tensor:
    """The example of each choice, `(B·C,)`, of a batch with `input_ids (B, C, T)`, which models run on as rows."""
    examples, count = batch["input_ids"].shape[:2]
    return torch.arange(examples).repeat_interleave(count)


def patch_mask(embeddings: nn.Module, batch: Batch) -> Tensor:
    """The patches of ViLT's `embeddings` that have a real pixel where the model looks for one, `(B, D, H, W)`."""
    weight: Tensor = embeddings.projection.weight  # type: ignore[union-attr, assignment]
    pixels, mask = batch["pixel_values"], batch.get("pixel_mask")
    real = torch.ones_like(pixels[:, 0]) if mask is None else mask
    grid = [size // patch for size, patch in zip(pixels.shape[2:], weight.shape[2:], strict=True)]
    return F.interpolate(real[:, None].float(), size=grid).bool().expand(-1, len(weight), -1, -1)


def packed_rows(batch: Batch, *, tokens: Collection[int], each: int = 1) -> Tensor:
    """The sample of each packed row, `(N,)`; a placeholder token stands for `each` rows."""
    counts = _among(batch["input_ids"], tokens).sum(1)
    return torch.arange(len(counts), device=counts.device).repeat_interleave(each * counts)


def image_rows(batch: Batch, *, tokens: Collection[int]) -> Tensor:
    """The sample of each image of `pixel_values (N, …)`, `(N,)`; all images have as many placeholder tokens.

    Raises:
        SiteError: they do not, or the fields do not say their number.
    """
    counts, images = _among(batch["input_ids"], tokens).sum(1), len(batch["pixel_values"])
    if batch["pixel_values"].ndim > 4 or batch.get("image_sizes") is not None:
        raise SiteError(
            f"expected pixel_values (images, C, H, W) of images of one size, got {tuple(batch['pixel_values'].shape)}"
            f"{' with image_sizes' if batch.get('image_sizes') is not None else ''}; {_BY_HAND}"
        )
    total = counts.sum()
    if (total == 0).item():
        return torch.arange(images, device=counts.device)
    if (counts * images % total).any():
        raise SiteError(
            f"expected image tokens that are the same number for each of {images} images, got {counts.tolist()} in the "
            f"samples; {_BY_HAND}"
        )
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts * images // total)


def filled_image_rows(batch: Batch, *, tokens: Collection[int]) -> Tensor:
    """The sample of each image of Idefics' `(B, images, C, H, W)`, `(N,)`, blank ones, which the model leaves out, aside."""
    pixels = batch["pixel_values"]
    if pixels.ndim != 5:
        return image_rows(batch, tokens=tokens)
    filled: Tensor = pixels.flatten(2).any(2)
    return filled.nonzero()[:, 0]


def tile_rows(model: LlavaNextModel, batch: Batch, *, tokens: Collection[int]) -> Tensor:
    """The sample of each tile that LLaVA-Next cuts its images into, `(N,)`, as many as `image_sizes` say.

    The number of tokens of an image of each size says which sample an image belongs to.

    Raises:
        SiteError: the placeholder tokens of the samples are not those of whole images.
    """
    counts, sizes, config = _among(batch["input_ids"], tokens).sum(1), batch["image_sizes"], model.config
    vision: Any = config.vision_config
    side = vision.image_size
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
    blank = [torch.zeros(count, (side // vision.patch_size) ** 2, 1) for count in tiles]
    _, lengths = model.pack_image_features(blank, sizes, "default", image_newline=torch.zeros(1))  # type: ignore[no-untyped-call]
    stops, ends = counts.cumsum(0), lengths.to(counts.device).cumsum(0)  # of samples and of images
    if stops[-1] != ends[-1] or not torch.isin(stops[counts > 0], ends).all():
        raise SiteError(
            f"expected image tokens of whole images, which have {lengths.tolist()}, got {counts.tolist()} in the samples; "
            "give both fields of one call of the processor"
        )
    return torch.searchsorted(stops, ends).repeat_interleave(torch.tensor(tiles, device=counts.device))


_BY_HAND = "say what to perturb yourself, with rows=… for the sample of each image"


def positions(model: PreTrainedModel) -> Callable[[Batch], Tensor | None]:
    """Return a function from the batch to the predictions that count, of the logits' shape less the last axis; None: all.

    For a model whose own loss does not say, that function raises ConfigurationError.
    """
    if not model.can_generate():
        per_token = getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
        return partial(_positions, mask="attention_mask" if per_token else None, shift=False)
    if getattr(model.config, "is_encoder_decoder", False):
        return partial(_positions, mask="decoder_attention_mask", shift=False)
    if (shift := _shifts(model)) is None:
        return partial(_unknown, name=type(model).__name__)
    return partial(_positions, mask="attention_mask", shift=shift)


# losses that do not go through `loss_function`, or not with the logits that the model gives: whether they shift labels
_SHIFTS = {
    "BartForCausalLM": False,
    "BlipForConditionalGeneration": True,
    "GitForCausalLM": None,  # its logits are of the image's positions too
}


def _shifts(model: PreTrainedModel) -> bool | None:
    """True if a decoder's own loss compares logits with the next word's label; None: not known."""
    classes = type(model).__mro__
    if (known := next((cls.__name__ for cls in classes if cls.__name__ in _SHIFTS), None)) is not None:
        return _SHIFTS[known]
    forwards = (inspect.unwrap(vars(cls)["forward"]) for cls in classes if "forward" in vars(cls))
    if not any("loss_function" in forward.__code__.co_names for forward in forwards if hasattr(forward, "__code__")):
        return None
    own = getattr(model, "_loss_function", None) or LOSS_MAPPING.get(model.loss_type, ForCausalLMLoss)
    return {ForCausalLMLoss: True, ForMaskedLMLoss: False}.get(own)


def _unknown(batch: Batch, *, name: str) -> None:
    del batch
    raise ConfigurationError(
        f"expected a model whose loss says which predictions count, got {name}, whose own does not; "
        f"pass positions=…{more('counted-predictions')}"
    )


def _positions(batch: Batch, *, mask: str | None, shift: bool) -> Tensor | None:
    """The predictions with a label; without labels, all but padding. Shifted, a prediction is of the next token."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        real = labels != -100
        return F.pad(real[:, 1:], (0, 1)) if shift else real
    if labels is None and mask is not None and batch.get(mask) is not None:
        real = batch[mask].bool()
        return F.pad(real[:, :-1] & real[:, 1:], (0, 1)) if shift else real
    return None


def _among(ids: Tensor, tokens: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))
