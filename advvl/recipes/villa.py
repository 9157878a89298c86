"""VILLA's fine-tuning, and the arguments that mean the same in every recipe.

These are `step_sizes`, which maps each modality to the length of one ascent step in the units of its embedding;
`radius` of the ball, in the same units (`math.inf`: none); `norm` of ball and step, `"l2"` or `"linf"`; `box`, (low,
high) bounds of the perturbed tensor itself, for pixels; `pixels`, the `Normalised` of a processor, so that radius, step
size and box are in pixels although the model takes normalised ones. Invalid values raise ConfigurationError.
"""

from __future__ import annotations

import math
from typing import Literal

from advvl.maximizers.base import Order
from advvl.maximizers.freelb import FreeLB
from advvl.ops import Norm
from advvl.perturbers.starts import Zero
from advvl.recipes.parts import ball_of, perturber_of
from advvl.regularizers.kl import SymmetricKL
from advvl.training import AdversarialTraining


def villa(
    step_sizes: dict[str, float] | None = None,
    *,
    steps: int = 3,
    radius: float = math.inf,
    kl_weight: float = 1.5,
    norm: Norm = "l2",
    modalities: Order = "together",
    clean_weight: float = 0.0,
    dropout: Literal["fresh", "shared"] = "fresh",
) -> AdversarialTraining:
    """VILLA's fine-tuning as released: K passes, symmetric KL into both branches, starts at zero, no projection.

    Gan et al., "Large-Scale Adversarial Training for Vision-and-Language Representation Learning", NeurIPS 2020. The
    defaults are those of its VQA-base configuration. Its paper's Algorithm 1 perturbs one modality at a time and keeps a
    clean term: `villa(step_sizes=…, modalities="in turn", clean_weight=0.5, radius=…)`, the paper's objective halved.
    """
    steps_of = {"text": 1e-3} if step_sizes is None else step_sizes
    return AdversarialTraining(
        perturber_of(steps_of, ball_of(norm, radius), Zero()),
        FreeLB(steps, modalities),
        SymmetricKL(kl_weight),
        clean_weight=clean_weight,
        dropout=dropout,
    )
