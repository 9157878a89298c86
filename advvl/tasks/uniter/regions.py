"""Masked region modelling: predict a masked region's feature (MRFR) or class (MRC, MRC-kl) from its surroundings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl.errors import DataError, ShapeError
from advvl.models.uniter.model import UniterConfig, UniterOutput


class FeatureRegression(nn.Module):
    """From hidden states to features, by the transposed projection that embeds features; loss: squared error."""

    def __init__(self, config: UniterConfig, project: nn.Linear) -> None:
        super().__init__()
        self.net = _transform(config)
        self.weight = project.weight
        self.bias = nn.Parameter(torch.zeros(config.img_dim))

    def forward(self, hidden: Tensor, masked: Tensor, targets: Tensor) -> UniterOutput:
        """Squared error at the masked regions, unreduced `(N, F)` and its mean.

        Arguments:
            hidden: `(B, S, H)`.
            masked: places of the sequences, `(B, S)` bool.
            targets: the true features of the N masked regions, `(N, F)`.
        """
        features = F.linear(self.net(_masked(hidden, masked, targets)), self.weight.t(), self.bias)
        _check("feat_targets", targets, features)
        wide = torch.promote_types(features.dtype, torch.float32)
        losses = F.mse_loss(features.to(wide), targets.to(wide), reduction="none")
        return UniterOutput(loss=losses.mean(), losses=losses)


class RegionClassifier(nn.Module):
    """From hidden states to scores of region classes, against one class or a distribution over them."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(*_transform(config), nn.Linear(config.hidden_size, config.img_label_dim))

    def forward(self, hidden: Tensor, masked: Tensor, targets: Tensor, *, soft: bool) -> UniterOutput:
        """Cross-entropy with the likeliest class, or `soft`: divergence from the distribution, mean over all entries.

        Arguments:
            hidden: `(B, S, H)`.
            masked: places of the sequences, `(B, S)` bool.
            targets: distributions over classes `(N, C)`; column 0 is the background, which is never the likeliest class
                (published code).
        """
        logits: Tensor = self.net(_masked(hidden, masked, targets))
        _check("label_targets", targets, logits)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if soft:
            losses = F.kl_div(wide.log_softmax(-1), targets.to(wide.dtype), reduction="none")
        else:
            losses = F.cross_entropy(wide, targets[:, 1:].argmax(-1) + 1, reduction="none")
        return UniterOutput(loss=losses.mean(), losses=losses, logits=logits)


def _transform(config: UniterConfig) -> nn.Sequential:
    width = config.hidden_size
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=config.layer_norm_eps))


def _masked(hidden: Tensor, masked: Tensor, targets: Tensor) -> Tensor:
    if masked.shape != hidden.shape[:2]:
        raise ShapeError(f"expected img_mask_tgt of shape {tuple(hidden.shape[:2])}, got {tuple(masked.shape)}")
    states = hidden[masked.bool()]
    if not states.shape[0]:
        raise DataError("expected a masked region in the batch, got none; mask one per image")
    if states.shape[0] != targets.shape[0]:
        raise ShapeError(f"expected one target for each of {states.shape[0]} masked regions, got {targets.shape[0]}")
    return states


def _check(name: str, targets: Tensor, wanted: Tensor) -> None:
    if targets.shape != wanted.shape:
        raise ShapeError(f"expected {name} of shape {tuple(wanted.shape)}, got {tuple(targets.shape)}")
    if not targets.is_floating_point():
        raise DataError(f"expected {name} of floating-point numbers, got {targets.dtype}")
