"""Masks of real positions, samples of packed rows, and the predictions that count, read from a batch.

The names are those of transformers' processors, and the defaults those of its models.
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
from advvl.models.huggingface.packing import attended, row_samples, samples


def placeholders(config: PreTrainedConfig) -> frozenset[int]:
    """The ids of tokens whose embedding the model replaces by that of an image, a video or a sound."""
    names = [f"{of}_token_{kind}" for of in _REPLACED for kind in ("id", "index")]
    found = (getattr(config, name, None) for name in names)
    return frozenset(token for token in found if isinstance(token, int))


_REPLACED = ("image", "video", "audio", "speech")


def text_mask(batch: Batch, *, void: Collection[int] = ()) -> Tensor:
    """The real words, `(B, T)`, or `(B·C, T)` of C choices: all attended to, but tokens whose embedding is replaced."""
    return (attended(batch) & ~_among(batch["input_ids"], void)).flatten(0, -2)


def text_mask_to_the_end(batch: Batch, *, void: Collection[int] = ()) -> Tensor:
    """The same, with the last position: SigLIP reads the text there, padded or not."""
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


def image_mask(batch: Batch, *, name: str, patch: int) -> Tensor:
    """The patches `(N, P)` that have a real pixel, of the images that the model keeps; those of SigLIP 2 come as patches.

    Arguments:
        batch: with `pixel_values` `(N, P, D)`, `(N, C, H, W)` or `(B, images, C, H, W)`.
        name: of the field with the mask: of patches `(N, P)`, or of pixels, `pixel_values` without C.
        patch: side of a patch, in pixels.
    """
    pixels, mask = batch["pixel_values"], batch.get(name)
    if pixels.ndim == 3:
        given: Tensor = pixels.new_ones(pixels.shape[:2]) if mask is None else mask
        return given.bool()
    real = torch.ones_like(pixels.select(-3, 0)) if mask is None else mask
    if pixels.ndim == 5:
        real = real[pixels.flatten(2).any(2)]
    return F.max_pool2d(real.float(), patch).flatten(1).bool()


def pixel_mask(batch: Batch, *, name: str) -> Tensor:
    """The real pixels, of the shape of `pixel_values` `(…, C, H, W)`; without a mask of this name `(…, H, W)` all."""
    pixels, mask = batch["pixel_values"], batch.get(name)
    real: Tensor = torch.ones_like(pixels) if mask is None else mask.unsqueeze(-3).expand(pixels.shape)
    return real.bool()


def flat_patch_mask(batch: Batch, *, given: bool) -> Tensor:
    """The real patches `(B, N)` of Pix2Struct's `flattened_patches`: the `attention_mask`, or all that are not zero.

    Arguments:
        given: the model's `attention_mask` is that of patches, not of words.
    """
    mask = batch.get("attention_mask") if given else None
    real: Tensor = batch["flattened_patches"].sum(-1) != 0 if mask is None else mask.bool()
    return real


def packed_rows(batch: Batch, *, tokens: Collection[int], by_position: bool = False, each: int = 1) -> Tensor:
    """The sample of each packed row, `(N,)`; a placeholder token stands for `each` rows."""
    return _token_samples(batch, tokens, by_position=by_position).repeat_interleave(each)


def image_rows(batch: Batch, *, tokens: Collection[int], by_position: bool = False) -> Tensor:
    """The sample of each image of `pixel_values (N, …)`, `(N,)`; all images have as many placeholder tokens.

    Raises:
        SiteError: they do not, or the fields do not say their number.
    """
    if batch["pixel_values"].ndim > 4 or batch.get("image_sizes") is not None:
        raise SiteError(
            f"expected pixel_values (images, C, H, W) of images of one size, got {tuple(batch['pixel_values'].shape)}"
            f"{' with image_sizes' if batch.get('image_sizes') is not None else ''}; {_BY_HAND}"
        )
    return _by_tokens(batch, tokens, len(batch["pixel_values"]), by_position=by_position)


def _by_tokens(batch: Batch, tokens: Collection[int], images: int, *, by_position: bool) -> Tensor:
    found = _token_samples(batch, tokens, by_position=by_position)
    if not len(found):
        return torch.arange(images, device=found.device)
    of_images = found.view(images, -1) if images and len(found) % images == 0 else None
    if of_images is None or (of_images != of_images[:, :1]).any():
        raise SiteError(
            f"expected image tokens that are the same number for each of {images} images, got "
            f"{found.bincount(minlength=len(batch['input_ids'])).tolist()} in the samples; {_BY_HAND}"
        )
    return of_images[:, 0]


def _token_samples(batch: Batch, tokens: Collection[int], *, by_position: bool) -> Tensor:
    """The sample of each placeholder token, in their order."""
    return row_samples(batch, by_position=by_position)[_among(batch["input_ids"], tokens)]


def filled_image_rows(batch: Batch, *, tokens: Collection[int], by_position: bool = False) -> Tensor:
    """The sample of each image of Idefics' `(B, images, C, H, W)`, `(N,)`, blank ones, which the model leaves out, aside."""
    pixels = batch["pixel_values"]
    if pixels.ndim != 5:
        return image_rows(batch, tokens=tokens, by_position=by_position)
    filled: Tensor = pixels.flatten(2).any(2)
    if samples(batch, by_position=by_position) is None:
        return filled.nonzero()[:, 0]
    return _by_tokens(batch, tokens, int(filled.sum()), by_position=by_position)


def tile_rows(model: LlavaNextModel, batch: Batch, *, tokens: Collection[int], by_position: bool = False) -> Tensor:
    """The sample of each tile of LLaVA-Next's images, `(N,)`, as many as `image_sizes` say.

    The number of tokens of an image of each size says which sample an image belongs to.

    Raises:
        SiteError: the placeholder tokens of the samples are not those of whole images.
    """
    of_tokens = _token_samples(batch, tokens, by_position=by_position)
    counts = of_tokens.bincount(minlength=len(batch["input_ids"]))
    tiles, _, lengths = _tiles(model, batch)
    stops, ends = counts.cumsum(0), lengths.to(counts.device).cumsum(0)  # of samples and of images
    if stops[-1] != ends[-1] or not torch.isin(stops[counts > 0], ends).all():
        raise SiteError(
            f"expected image tokens of whole images, which have {lengths.tolist()}, got {counts.tolist()} in the samples; "
            "give both fields of one call of the processor"
        )
    return torch.searchsorted(stops, ends).repeat_interleave(torch.tensor(tiles, device=counts.device))


def tile_mask(model: LlavaNextModel, batch: Batch) -> Tensor:
    """The features `(tiles, P)` of LLaVA-Next's tiles that become tokens: those of padding around an image are cut off."""
    tiles, kept, _ = _tiles(model, batch)
    vision: Any = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return torch.isin(torch.arange(1, sum(tiles) * patches + 1, dtype=kept.dtype), kept).view(-1, patches)


def _tiles(model: LlavaNextModel, batch: Batch) -> tuple[list[int], Tensor, Tensor]:
    """The tiles of each image, the features that become tokens, numbered from 1 through all tiles, and tokens an image."""
    sizes = batch["image_sizes"]
    vision: Any = model.config.vision_config
    side, patches = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    tiles = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, side) for size in sizes]
    numbers = torch.arange(1, sum(tiles) * patches + 1, dtype=torch.float64).view(-1, patches, 1)
    newline = torch.zeros(1, dtype=numbers.dtype)
    kept, lengths = model.pack_image_features(numbers.split(tiles), sizes, "default", image_newline=newline)  # type: ignore[no-untyped-call]
    return tiles, torch.cat(tuple(kept)).flatten(), lengths


_BY_HAND = "say what to perturb yourself, with rows=… for the sample of each image"


def positions(model: PreTrainedModel, *, prompt: int = 0) -> Callable[[Batch], Tensor | None]:
    """Return a function from the batch to the predictions that count, of the logits' shape less the last axis; None: all.

    For a model whose own loss does not say, that function raises ConfigurationError.

    Arguments:
        model: the model itself, without wrappers.
        prompt: predictions at prompts that PEFT puts before the words.
    """
    if not model.can_generate():
        per_token = getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
        return partial(_positions, mask="attention_mask" if per_token else None, shift=False, prompt=prompt)
    if getattr(model.config, "is_encoder_decoder", False):
        return partial(_positions, mask="decoder_attention_mask", shift=False)
    if (shift := _shifts(model)) is None:
        return partial(_unknown, name=type(model).__name__)
    return partial(_positions, mask="attention_mask", shift=shift, prompt=prompt)


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


def _positions(batch: Batch, *, mask: str | None, shift: bool, prompt: int = 0) -> Tensor | None:
    """The predictions with a label; without labels, all but padding. If shifted, a prediction is for the next token."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        real = F.pad(labels != -100, (prompt, 0))
        return F.pad(real[:, 1:], (0, 1)) if shift else real
    if labels is None and mask is not None and batch.get(mask) is not None:
        real = attended(batch) if mask == "attention_mask" else batch[mask].bool()
        known, real = F.pad(real, (prompt, 0), value=True), F.pad(real, (prompt, 0))
        return F.pad(known[:, :-1] & real[:, 1:], (0, 1)) if shift else real
    return None


def _among(ids: Tensor, tokens: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))
