"""FreeLB."""

from __future__ import annotations

import math
from typing import Literal

from advvl.checks import is_number
from advvl.maximizers.base import Order
from advvl.maximizers.freelb import FreeLB
from advvl.ops import Norm
from advvl.perturbers.starts import Start, Uniform, Zero
from advvl.recipes.parts import ball_of, perturber_of
from advvl.training import AdversarialTraining


def freelb(
    step_sizes: dict[str, float] | None = None,
    *,
    steps: int = 3,
    init_magnitude: float = 0.0,
    radius: float = math.inf,
    norm: Norm = "l2",
    modalities: Order = "together",
    dropout: Literal["fresh", "shared"] = "fresh",
) -> AdversarialTraining:
    """FreeLB: K passes whose parameter gradients add up while the perturbation climbs; `steps` counts passes.

    Zhu et al., "FreeLB: Enhanced Adversarial Training for Natural Language Understanding", ICLR 2020. Its fairseq code
    counts moves instead: `--adv-steps s` is `steps=s+1` here.
    """
    steps_of = {"text": 1e-1} if step_sizes is None else step_sizes
    start: Start = Zero() if is_number(init_magnitude) and init_magnitude == 0 else Uniform(init_magnitude)
    return AdversarialTraining(
        perturber_of(steps_of, ball_of(norm, radius), start), FreeLB(steps, modalities), dropout=dropout
    )
