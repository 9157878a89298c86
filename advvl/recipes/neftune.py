"""NEFTune."""

from __future__ import annotations

from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import perturber_at
from advvl.training import AdversarialTraining


def neftune(alpha: float = 5.0, *, modality: str = "text") -> AdversarialTraining:
    """NEFTune: one pass under uniform noise in ±alpha/√(length·D), and no ascent; the length counts real positions alone.

    Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024.
    """
    noise = Ascent(L2(), step_size=0.0, allow_zero_step=True, start=Uniform(alpha))
    return AdversarialTraining(perturber_at(modality, noise), FreeLB(steps=1))
