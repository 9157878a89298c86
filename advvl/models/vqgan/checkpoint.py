"""A VQGAN's checkpoints, read under their published names; and codebooks of your own."""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from advvl.checks import is_whole, shown
from advvl.errors import CheckpointError, ConfigurationError
from advvl.models.state_files import LoadReport, Naming, load_state, read_state
from advvl.models.vqgan.model import VQGAN, Codebook

_CODES: Final = "quantize.embedding.weight"
_NAMING: Final = Naming(str, frozenset())


def load_vqgan(model: VQGAN, path: str | os.PathLike[str]) -> LoadReport:
    """Read a published `.ckpt` or a `.safetensors` file into a VQGAN, all of it or nothing; no code in it is run.

    Returns:
        A report whose `unexpected` lists the ignored tensors: the loss with its discriminator, and averages of weights.

    Raises:
        CheckpointError: a file that is missing or more than tensors, lacks a tensor or has others; a codebook of another
            size.
    """
    state = read_state(path, under="state_dict")
    codes, wanted = state.get(_CODES), tuple(model.quantize.embedding.weight.shape)
    if codes is not None and tuple(codes.shape) != wanted:
        size = tuple(codes.shape)
        raise CheckpointError(
            f"expected a codebook of {wanted[0]} codes of {wanted[1]} numbers, got {size} in {str(path)!r}; make the model "
            "by VQGANConfig(codes=…, code_width=…)"
        )
    return load_state(model, state, _NAMING, source=path, allow_unexpected=("loss", "model_ema"))


def kmeans_codebook(features: Tensor, codes: int, *, seed: int, iterations: int = 20) -> Codebook:
    """Make a codebook of k-means centres of region features, to discretise these as DAT does images.

    It is this library's extension of DAT, whose code and paper use only pixels.

    Arguments:
        features: `(N, D)`, or `(…, D)` with every region real.
        codes: K, at most N.
        seed: of the first centres, drawn by k-means++.
        iterations: of Lloyd's algorithm.

    Raises:
        ConfigurationError: no tensor of floats, fewer different vectors than codes, or features that are not finite.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point() or not features.ndim:
        raise ConfigurationError(f"expected features as a tensor of floats (N, D), got {shown(features)}")
    vectors = features.detach().cpu().reshape(-1, features.shape[-1]).double().numpy()
    if not is_whole(codes) or not 0 < codes <= len(vectors):
        raise ConfigurationError(f"expected codes of 1 to {len(vectors)}, the number of vectors, got {shown(codes)}")
    if not np.isfinite(vectors).all():
        raise ConfigurationError("expected finite features, got others; leave their regions out")
    if (different := len(np.unique(vectors, axis=0))) < codes:
        raise ConfigurationError(f"expected at least {codes} different vectors, got {different}; ask for fewer codes")
    centres, _ = kmeans2(vectors, codes, iter=iterations, minit="++", rng=np.random.default_rng(seed), missing="warn")
    book = Codebook(codes, vectors.shape[1])
    book.load_state_dict({"embedding.weight": torch.from_numpy(centres).to(features.dtype)})
    return book.to(features.dtype).eval().requires_grad_(False)
