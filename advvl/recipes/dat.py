"""Discrete adversarial training."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from advvl.checks import is_number, shown
from advvl.errors import ConfigurationError
from advvl.maximizers.pgd import PGD
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.discrete import DiscretePerturber, Perturbed
from advvl.perturbers.starts import Normal, Sometimes
from advvl.training import AdversarialTraining


def dat(
    discretise: Callable[[Tensor], Tensor],
    *,
    radius: float = 0.1,
    step_size: float = 0.1,
    steps: int = 1,
    start_probability: float = 0.8,
    perturbed: Perturbed = "after",
    modality: str = "image",
    box: tuple[float, float] | None = (0.0, 1.0),
) -> AdversarialTraining:
    """DAT as released: the clean loss + that of Q(Q(x) + δ), δ one L2 step in pixels from Q(x), straight through Q.

    Mao et al., "Enhance the Visual Representation via Discrete Adversarial Training", NeurIPS 2022. There Q is the
    reconstruction of a VQGAN. For the paper's Q(x + δ) from a zero start use `dat(Q, perturbed="before",
    start_probability=0)`.
    """
    if not is_number(radius) or not 0 <= radius < math.inf:
        raise ConfigurationError(f"expected radius to be a finite number of 0 or more, got {shown(radius)}")
    if not isinstance(modality, str) or not modality:
        raise ConfigurationError(f"expected modality to be a text, got {shown(modality)}")
    far = Normal(1e6 * radius)  # always outside the ball: brought back, a random direction as long as the radius
    start = Sometimes(far, probability=start_probability)
    ascent = Ascent(L2(radius), step_size=step_size, start=start, box=box)
    perturber = DiscretePerturber(discretise, perturbed=perturbed, **{modality: ascent})
    return AdversarialTraining(perturber, PGD(steps), clean_weight=1.0)
