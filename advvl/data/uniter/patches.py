"""Regions of a picture without a detector: the cells of a grid, with the features of a vision tower of transformers.

from transformers import AutoImageProcessor, Dinov2Model

tower, processor = (kind.from_pretrained("facebook/dinov2-base") for kind in (Dinov2Model, AutoImageProcessor))
patches = PatchRegions(tower, processor, cache="patches")
source = vqa_source(records, tokenizer, answers=answers, regions=patches)  # `image` of a record is a picture
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from advvl.checks import at_least, check_each, is_whole, path_of, shown
from advvl.data.uniter.regions import Regions, regions_of
from advvl.errors import ConfigurationError, DataError
from advvl.files import write_safetensors
from advvl.runtime.states import kept_modes

_FORMAT: Final = 1  # of the files of a cache


@dataclass(frozen=True, eq=False)
class PatchRegions:
    """Makes regions of pictures: the cells of a grid, row by row, each with the mean of the features of its patches.

    The whole picture is scaled to a square without cutting its edges, so boxes match positions in the picture.

    Arguments:
        tower: gives `last_hidden_state`, (B, T, F), one per patch after those of other tokens, as CLIP, DINOv2 and
            SigLIP do, or (B, F, h, w); always run in eval mode.
        processor: the tower's image processor; it rescales and normalises.
        grid: rows and columns of cells.
        size: side of the square in pixels; None: `image_size` of the tower's configuration.
        cache: folder for features, keyed by the pixels of a picture and the tower's weights at the first picture; None:
            features are computed at each call.

    Raises:
        ConfigurationError: a grid without cells; no size, and none in the configuration.
    """

    tower: nn.Module
    processor: Any
    grid: tuple[int, int] = (6, 6)
    size: int | None = None
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_each(self, ("grid",), _is_grid, "two whole numbers of 1 or more, rows and columns")
        if self.size is not None:
            at_least(1, self, "size")
        if not is_whole(self._side):
            raise ConfigurationError(
                f"expected size as the side of a square in pixels, got {shown(self._side)}; give size="
            )

    def __call__(self, picture: Any) -> Regions:
        """Return the regions of a picture: of Pillow, or an array (H, W, 3) or (H, W), or a tensor (3, H, W), of 0..255.

        Raises:
            DataError: anything else; a file of the cache that cannot be read.
            ConfigurationError: a tower without features for each patch, or with fewer patches than the grid has cells.
        """
        pixels = _pixels(picture)
        features = self._features(pixels) if self.cache is None else self._cached(pixels, path_of(self.cache))
        return regions_of(features, self._boxes)

    @property
    def _side(self) -> Any:
        if self.size is not None:
            return self.size
        found = getattr(getattr(self.tower, "config", None), "image_size", None)
        return found[0] if isinstance(found, list | tuple) and len(set(found)) == 1 else found

    @cached_property
    def _boxes(self) -> Tensor:
        """Corners of the cells (rows * columns, 4), in parts of the picture."""
        rows, columns = self.grid
        top, left = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        corners = torch.stack([left / columns, top / rows, (left + 1) / columns, (top + 1) / rows], -1)
        return corners.reshape(-1, 4)

    @cached_property
    def _identity(self) -> str:
        """A hash of everything that features depend on besides the picture."""
        processor = self.processor.to_dict() if hasattr(self.processor, "to_dict") else repr(self.processor)
        kind = f"{type(self.tower).__module__}.{type(self.tower).__qualname__}"
        said = json.dumps([_FORMAT, kind, processor, self.grid, self._side], sort_keys=True, default=str)
        found = hashlib.sha256(said.encode())
        for name, weight in sorted(self.tower.state_dict().items()):
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:32]

    def _cached(self, pixels: NDArray[np.uint8], folder: Path) -> Tensor:
        content = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        path = folder / self._identity / f"{content}.safetensors"
        if path.exists():
            try:
                return load_file(path)["features"]
            except (OSError, KeyError, SafetensorError) as error:
                raise DataError(f"expected features in {str(path)!r}, got {error}; remove the file") from error
        features = self._features(pixels)
        write_safetensors(path, {"features": features})
        return features

    def _features(self, pixels: NDArray[np.uint8]) -> Tensor:
        """The features of the cells, (rows * columns, F) float32 on the CPU."""
        side = self._side
        whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(torch.float32)
        square = F.interpolate(whole, size=(side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
        given = self.processor(
            images=square[0].permute(1, 2, 0).to(torch.uint8).numpy(),
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"]
        weight = next(self.tower.parameters())
        with kept_modes(self.tower), torch.no_grad():
            found = self.tower.eval()(pixel_values=given.to(weight.device, weight.dtype)).last_hidden_state
        return F.adaptive_avg_pool2d(self._map(found).float(), self.grid)[0].flatten(1).T.contiguous().cpu()

    def _map(self, states: Tensor) -> Tensor:
        """The features of the patches where they are in the picture, (1, F, h, w)."""
        if states.ndim == 3:
            patch = getattr(self.tower.config, "patch_size", None)
            across = self._side // patch if is_whole(patch) else 0
            if not across or states.shape[1] < across**2:
                raise ConfigurationError(
                    f"expected features of each patch of {shown(patch)} pixels, got {tuple(states.shape)}; give another"
                )
            states = states[:, -(across**2) :].transpose(1, 2).reshape(len(states), -1, across, across)
        if states.ndim != 4 or states.shape[2] < self.grid[0] or states.shape[3] < self.grid[1]:
            raise ConfigurationError(
                f"expected patches for a grid of {self.grid}, got {tuple(states.shape[2:])}; give a coarser grid, or a size"
            )
        return states


def _is_grid(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_whole(one) and one > 0 for one in value)


def _pixels(picture: Any) -> NDArray[np.uint8]:
    """A picture as an array (H, W, 3) of its own."""
    if isinstance(picture, Tensor):
        picture = picture.cpu().numpy().transpose(1, 2, 0) if picture.ndim == 3 else picture.cpu().numpy()
    found = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if found.ndim == 2:
        found = np.repeat(found[..., None], 3, axis=2)
    if found.ndim != 3 or found.shape[2] != 3 or not found.size or found.dtype != np.uint8:
        raise DataError(
            f"expected a picture (H, W, 3) of uint8, got {found.dtype} of shape {found.shape}; convert it to RGB in 0..255"
        )
    return np.array(found, order="C")
