"""Image-text matching, with word-region alignment by optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.errors import DataError, ShapeError
from advvl.models.uniter.model import UniterOutput
from advvl.tasks.uniter.transport import transport_distance


def match(logits: Tensor, targets: Tensor, distances: Tensor | None = None, *, weight: float = 0.0) -> UniterOutput:
    """Cross-entropy of match (1) against mismatch (0); with distances also their mean, those of mismatches negated.

    Arguments:
        logits: `(B, 2)`.
        targets: `(B,)` long.
        distances: between each row's tokens and regions, `(B,)`.
        weight: of the distances' term in the loss.

    Raises:
        ShapeError, DataError: targets that are not `(B,)` of whole numbers.
    """
    if targets.shape != logits.shape[:1]:
        raise ShapeError(f"expected targets of shape (B,) = {tuple(logits.shape[:1])}, got {tuple(targets.shape)}")
    if targets.is_floating_point():
        raise DataError(f"expected targets to be whole numbers, 1 for a match, got {targets.dtype}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.to(wide), targets, reduction="none")
    loss = losses.mean()
    if distances is not None:
        loss = loss + weight * torch.where(targets == 1, distances, -distances).mean()
    return UniterOutput(loss=loss, losses=losses, logits=logits, distances=distances)


def alignment_distances(hidden: Tensor, text_mask: Tensor, region_mask: Tensor) -> Tensor:
    """The distance of each row's tokens from its regions, `(B,)`, [CLS] and [SEP] among the tokens.

    Arguments:
        hidden: `(B, S, H)`, each row's tokens first, its regions right after them.
        text_mask, region_mask: the real tokens `(B, L)` and regions `(B, R)`.
    """
    lengths = text_mask.sum(1, keepdim=True)
    places = lengths + torch.arange(region_mask.shape[1], device=hidden.device)
    places = places.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return transport_distance(hidden[:, : text_mask.shape[1]], hidden.gather(1, places), text_mask, region_mask)
