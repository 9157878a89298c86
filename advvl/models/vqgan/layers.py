"""The layers of a VQGAN's encoder and decoder, with the names that published checkpoints give them."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS: Final = 32  # of channels that are normalised together


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with `GROUPS` groups, or one for each channel where there are fewer."""
    return nn.GroupNorm(min(GROUPS, channels), channels, eps=1e-6)


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, `(B, C, H, W)` to `(B, C′, H, W)`."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class Attention(nn.Module):
    """Single-head self-attention over the places of an image, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(attended)
        return out


class Downsample(nn.Module):
    """Halve height and width; the padding is at the right and the bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Double height and width, by the nearest pixel and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where there is some, then a change of resolution."""

    def __init__(self, channels: int, out_channels: int, blocks: int, *, attention: bool, resize: str = "") -> None:
        super().__init__()
        sizes = [channels, *[out_channels] * blocks]
        self.block = nn.ModuleList(Residual(*pair) for pair in pairwise(sizes))
        self.attn = nn.ModuleList(Attention(out_channels) for _ in range(blocks if attention else 0))
        if resize == "down":
            self.downsample = Downsample(out_channels)
        if resize == "up":
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            x = self.attn[number](x) if len(self.attn) else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Middle(nn.Module):
    """Two blocks around attention, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = Residual(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out
