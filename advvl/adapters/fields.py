"""What the fields of a batch say: which positions are real, which sample a packed row is of, which predictions count.

The names are those that transformers' processors give, and the defaults those that its models take.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from advvl.adapters.injection import Batch
from advvl.errors import SiteError


def placeholders(config: PreTrainedConfig) -> frozenset[int]:
    """The ids of tokens whose embedding the model replaces by that of an image or a video."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return frozenset(token for token in found if isinstance(token, int))


def text_mask(batch: Batch, *, void: Collection[int] = ()) -> Tensor:
    """`(B, T)`: all that is attended to, but tokens whose embedding is replaced."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return real & ~_among(ids, void)


def text_mask_to_the_end(batch: Batch, *, void: Collection[int] = ()) -> Tensor:
    """The same, and the last position: SigLIP reads the text there, padded or not."""
    mask = text_mask(batch, void=void)
    return mask | (torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1)


def region_mask(projection: nn.Module, batch: Batch) -> Tensor:
    """`(B, R)`: all regions but padding."""
    del projection
    mask = batch.get("visual_attention_mask")
    return torch.ones(batch["visual_embeds"].shape[:-1], dtype=torch.bool) if mask is None else mask.bool()


def patch_mask(embeddings: nn.Module, batch: Batch) -> Tensor:
    """`(B, D, H, W)`: patches, of ViLT's `embeddings`, that have a real pixel where the model looks for one."""
    weight: Tensor = embeddings.projection.weight  # type: ignore[union-attr, assignment]
    pixels, mask = batch["pixel_values"], batch.get("pixel_mask")
    real = torch.ones_like(pixels[:, 0]) if mask is None else mask
    grid = [size // patch for size, patch in zip(pixels.shape[2:], weight.shape[2:], strict=True)]
    return F.interpolate(real[:, None].float(), size=grid).bool().expand(-1, len(weight), -1, -1)


def packed_rows(batch: Batch, *, tokens: Collection[int], each: int = 1) -> Tensor:
    """`(N,)`: the sample of each packed row, of which a placeholder token stands for `each`."""
    counts = _among(batch["input_ids"], tokens).sum(1)
    return torch.arange(len(counts), device=counts.device).repeat_interleave(each * counts)


def image_rows(batch: Batch, *, tokens: Collection[int]) -> Tensor:
    """`(N,)`: the sample of each image, all of which have as many placeholder tokens; or of those that are not blank.

    Raises:
        SiteError: they have not.
    """
    pixels = batch["pixel_values"]
    if pixels.ndim == 5:  # (B, images, C, H, W), filled up with blank ones, which the model leaves out
        filled: Tensor = pixels.flatten(2).any(2)
        return filled.nonzero()[:, 0]
    counts, images = _among(batch["input_ids"], tokens).sum(1), len(pixels)
    total = counts.sum()
    if (total == 0).item():
        return torch.arange(images, device=counts.device)
    if (counts * images % total).any():
        raise SiteError(
            f"expected image tokens that are the same number for each of {images} images, got {counts.tolist()} in the "
            "samples; say what to perturb yourself, with rows=… for the sample of each image"
        )
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts * images // total)


def positions(model: PreTrainedModel) -> Callable[[Batch], Tensor | None]:
    """From the batch to the predictions that count, of the logits' shape without the last axis; None: all of them."""
    pair = bool(getattr(model.config, "is_encoder_decoder", False))
    writes = bool(model.can_generate())
    per_token = writes or getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
    mask = ("decoder_attention_mask" if pair else "attention_mask") if per_token else None
    return partial(_positions, mask=mask, shift=writes and not pair)


def _positions(batch: Batch, *, mask: str | None, shift: bool) -> Tensor | None:
    """Those with a label; without labels, those that are no padding. The logits of a causal model are of the next token."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        real = labels != -100
    elif labels is None and mask is not None and batch.get(mask) is not None:
        real = batch[mask].bool()
    else:
        return None
    return F.pad(real[:, 1:], (0, 1)) if shift else real


def _among(ids: Tensor, tokens: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))
