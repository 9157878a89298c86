"""A VQGAN without its discriminator: encoder, codebook and decoder, named as in the published checkpoints.

Source: Esser, Rombach & Ommer, "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021, and the checkpoints of
its code and of latent diffusion's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl.checks import at_least, check_each, is_whole, positive
from advvl.errors import ConfigurationError, ShapeError
from advvl.models.vqgan.layers import GROUPS, Level, Middle, norm

_CHUNK = 2**24  # distances of codes that are held at once


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The sizes of a VQGAN; the defaults are those of the f=8 model with 16,384 codes that DAT uses.

    Arguments:
        codes, code_width: of the codebook.
        z_channels: of the encoder's output.
        channels: of the first level; level i has `channels * multiples[i]`.
        multiples: one for each level; an image shrinks by 2 from level to level.
        blocks: of each level, one more in the decoder.
        attention: at levels of this many pixels a side, counted from `resolution`.
        resolution: pixels per side of the training images; other sizes divisible by the shrinking factor work too.
        in_channels: of an image.

    Raises:
        ConfigurationError: a size below 1, no level, channels that do not divide into groups to normalise.
    """

    codes: int = 16384
    code_width: int = 4
    z_channels: int = 4
    channels: int = 128
    multiples: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (32,)
    resolution: int = 256
    in_channels: int = 3

    def __post_init__(self) -> None:
        names = ("codes", "code_width", "z_channels", "channels", "blocks", "resolution", "in_channels")
        at_least(1, self, *names)
        check_each(
            self, ("multiples",), lambda value: _are_sizes(value) and len(value) > 0, "one or more whole numbers"
        )
        check_each(self, ("attention",), _are_sizes, "a tuple of whole numbers, or an empty one")
        for width in (self.channels * multiple for multiple in (1, *self.multiples)):
            if width > GROUPS and width % GROUPS:
                raise ConfigurationError(
                    f"expected channels * multiples up to {GROUPS}, or divisible by {GROUPS}, got {width}"
                )

    @property
    def shrinks_by(self) -> int:
        """The pixels per side of one code."""
        return int(2 ** (len(self.multiples) - 1))

    def attends(self, level: int) -> bool:
        return self.resolution // 2**level in self.attention


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(is_whole(size) and size > 0 for size in value)


class Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        sizes = [config.channels * multiple for multiple in (1, *config.multiples)]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                sizes[level],
                sizes[level + 1],
                config.blocks,
                attention=config.attends(level),
                resize="down" if level < len(sizes) - 2 else "",
            )
            for level in range(len(sizes) - 1)
        )
        self.mid = Middle(sizes[-1])
        self.norm_out = norm(sizes[-1])
        self.conv_out = nn.Conv2d(sizes[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        sizes = [config.channels * multiple for multiple in config.multiples]
        before = [*sizes[1:], sizes[-1]]
        self.conv_in = nn.Conv2d(config.z_channels, sizes[-1], 3, padding=1)
        self.mid = Middle(sizes[-1])
        self.up = nn.ModuleList(
            Level(
                before[level],
                sizes[level],
                config.blocks + 1,
                attention=config.attends(level),
                resize="up" if level > 0 else "",
            )
            for level in range(len(sizes))
        )
        self.norm_out = norm(sizes[0])
        self.conv_out = nn.Conv2d(sizes[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Codebook(nn.Module):
    """K codes `(K, D)`; as a discretiser it gives the nearest one to each vector on the last axis, `(…, D)`.

    For region features its codes may be k-means centres, see `kmeans_codebook`.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The number of the nearest code, `(…)` long, by Euclidean distance.

        Raises:
            ShapeError: vectors of another width than the codes.
        """
        codes = self.embedding.weight
        if vectors.shape[-1] != codes.shape[1]:
            raise ShapeError(
                f"expected vectors as wide as the codes, {codes.shape[1]}, got {vectors.shape[-1]}; make a codebook of those"
            )
        wide = torch.promote_types(torch.promote_types(codes.dtype, vectors.dtype), torch.float32)  # else codes far off
        with torch.autocast(vectors.device.type, enabled=False):
            flat, codes = vectors.reshape(-1, codes.shape[1]).to(wide), codes.to(wide)
            squares, chunks = codes.square().sum(1), torch.split(flat, max(1, _CHUNK // len(codes)))
            found = [torch.addmm(squares, chunk, codes.T, alpha=-2).argmin(1) for chunk in chunks]
        return torch.cat(found).view(vectors.shape[:-1]) if found else flat.new_zeros(vectors.shape[:-1]).long()

    def forward(self, vectors: Tensor) -> Tensor:
        codes: Tensor = self.embedding(self.nearest(vectors))
        return codes.to(vectors.dtype)


class VQGAN(nn.Module):
    """Images in [0, 1] to codes and back; called, it is the discretiser Q of `advvl.dat`.

    Q(x) is: to [-1, 1], encode, the nearest code at each place, decode, clamp to [-1, 1], back to [0, 1].
    """

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQGANConfig()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Codebook(config.codes, config.code_width)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """From images `(B, C, H, W)` in [0, 1] to vectors `(B, H/f, W/f, D)`, which are no codes yet.

        Raises:
            ShapeError: images of other channels, or of a size that does not shrink evenly.
        """
        config = self.config
        size = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != config.in_channels or any(side % config.shrinks_by for side in size):
            raise ShapeError(
                f"expected images (B, {config.in_channels}, H, W) with sides divisible by {config.shrinks_by}, got "
                f"{tuple(images.shape)}; resize them"
            )
        vectors: Tensor = self.quant_conv(self.encoder(2 * images - 1))
        return vectors.permute(0, 2, 3, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """From codes `(B, h, w, D)` to images about [0, 1], not yet clamped."""
        decoded: Tensor = self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))
        return (decoded + 1) / 2

    def forward(self, images: Tensor) -> Tensor:
        """Q: the images reconstructed from their codes, `(B, C, H, W)` in [0, 1]."""
        return self.decode(self.quantize(self.encode(images))).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class VQLoss:
    """The loss that a small VQGAN is trained by, without perceptual and adversarial terms: that of a VQ-VAE.

    Arguments:
        commitment: weight of the encoder's pull towards its codes, β.

    Source: van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017.
    """

    commitment: float = 0.25

    def __post_init__(self) -> None:
        positive(self, "commitment")

    def __call__(self, model: VQGAN, images: Tensor) -> Tensor:
        """Squared error of the reconstruction + codes towards vectors + β · vectors towards codes, a scalar."""
        vectors = model.encode(images)
        codes = model.quantize(vectors)
        decoded = model.decode(vectors + (codes - vectors).detach())
        to_codes = F.mse_loss(codes, vectors.detach())
        return F.mse_loss(decoded, images) + to_codes + self.commitment * F.mse_loss(vectors, codes.detach())
