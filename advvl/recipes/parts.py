"""Parts that several recipes share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from advvl.adapters.outputs import Outputs, field
from advvl.checks import is_choice, is_number, shown
from advvl.errors import ConfigurationError
from advvl.ops import Box, Norm
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Start
from advvl.training import AdversarialTraining

PUBLISHED_FLOOR = 1e-8  # under the gradient's norm, in VILLA's and FreeLB's code


def ball_of(norm: Norm, radius: float) -> Ball:
    if not is_choice(norm, get_args(Norm)):
        raise ConfigurationError(f"expected norm to be one of {get_args(Norm)}, got {norm!r}")
    return L2(radius) if norm == "l2" else Linf(radius)


def perturber_of(step_sizes: dict[str, float], ball: Ball, start: Start) -> EmbeddingPerturber:
    if not isinstance(step_sizes, Mapping) or not all(isinstance(name, str) for name in step_sizes):
        raise ConfigurationError(
            f'expected step_sizes as a mapping from modality to step size, as in {{"text": 0.1}}, got {step_sizes!r}'
        )
    return EmbeddingPerturber(
        **{
            modality: Ascent(ball, step_size=step_size, start=start, floor=PUBLISHED_FLOOR)
            for modality, step_size in step_sizes.items()
        }
    )


def perturber_at(modality: str, ascent: Ascent) -> EmbeddingPerturber:
    """Return the perturber of one modality."""
    if not isinstance(modality, str):
        raise ConfigurationError(f"expected modality to be a text, got {shown(modality)}")
    return EmbeddingPerturber(**{modality: ascent})


def check_positive(name: str, value: Any) -> None:
    """Raise ConfigurationError unless a value that is computed with is a finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigurationError(f"expected {name} as a finite number above 0, got {shown(value)}")


def check_masks(**masks: object) -> None:
    """Raise ConfigurationError unless each is a function, from the batch to a mask."""
    for name, mask in masks.items():
        if not callable(mask):
            raise ConfigurationError(
                f"expected {name} as a function from the batch to a mask (B, T), got {shown(mask)}"
            )


def check_names(name: str, values: object) -> None:
    """Raise ConfigurationError unless it is a list or tuple of names; a text is one name, not several letters."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ConfigurationError(f'expected {name} as a list of names, as in ["text"], got {shown(values)}')


def check_matrix(name: str, value: object) -> None:
    """Raise ConfigurationError unless it is a matrix that a backward reaches."""
    if not isinstance(value, Tensor) or value.ndim != 2 or (torch.is_grad_enabled() and not value.requires_grad):
        got = f"{tuple(value.shape)} without" if isinstance(value, Tensor) and value.ndim == 2 else shown(value)
        raise ConfigurationError(f"expected {name} as a matrix (V, D) that requires gradients, got {got}; train it")


def check_method(method: object) -> None:
    """Raise ConfigurationError unless it is a method of training."""
    if not isinstance(method, AdversarialTraining):
        raise ConfigurationError(
            f"expected a method such as pgd(radius=…, step_size=…), got {shown(method)}; give an AdversarialTraining"
        )


def steepest(
    norm: Norm,
    radius: float,
    *,
    step_size: float,
    start: Start,
    box: Box | None = None,
    pixels: Normalised | None = None,
) -> Ascent:
    """An ascent by the steepest step of its norm: the gradient's sign under Linf, its direction under L2."""
    ball = ball_of(norm, radius)
    rule: Literal["sign", "normalised"] = "sign" if norm == "linf" else "normalised"
    return Ascent(ball, step_size=step_size, start=start, rule=rule, box=box, pixels=pixels)


def image_embedding(outputs: Outputs) -> Tensor:
    """The embedding of each image `(B, D)` among a vision tower's outputs, projected if the tower projects.

    Raises:
        ConfigurationError: there is none.
    """
    for name in ("image_embeds", "pooler_output"):
        if isinstance(found := field(outputs, name), Tensor):
            return found
    raise ConfigurationError(
        f"expected outputs with image_embeds or pooler_output, got {type(outputs).__name__}; pass reads=…, a "
        "module's name or a function of the outputs"
    )
