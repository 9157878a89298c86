"""What several recipes are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from advvl.errors import ConfigurationError
from advvl.ops import Norm
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.starts import Start

PUBLISHED_FLOOR = 1e-8  # under the gradient's norm, in VILLA's and FreeLB's code


def ball_of(norm: Norm, radius: float) -> Ball:
    if norm not in get_args(Norm):
        raise ConfigurationError(f"expected norm to be one of {get_args(Norm)}, got {norm!r}")
    return L2(radius) if norm == "l2" else Linf(radius)


def perturber_of(step_sizes: dict[str, float], ball: Ball, start: Start) -> EmbeddingPerturber:
    if not isinstance(step_sizes, Mapping):
        raise ConfigurationError(
            f'expected step_sizes as a mapping from modality to step size, as in {{"text": 0.1}}, got {step_sizes!r}'
        )
    return EmbeddingPerturber(
        **{
            modality: Ascent(ball, step_size=step_size, start=start, floor=PUBLISHED_FLOOR)
            for modality, step_size in step_sizes.items()
        }
    )
