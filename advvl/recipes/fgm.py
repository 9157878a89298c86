"""The fast gradient method."""

from __future__ import annotations

from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.recipes.parts import perturber_at
from advvl.training import AdversarialTraining


def fgm(radius: float = 1.0, *, modality: str = "text") -> AdversarialTraining:
    """FGM: ½ (L(x) + L(x + δ)) with δ = ε·g/‖g‖, g the gradient of the clean loss at the embedded words.

    Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification", ICLR 2017. The class that is
    often pasted adds up both gradients, which is twice this, and takes one norm over the whole batch; here each row has
    its own.
    """
    return AdversarialTraining(perturber_at(modality, Ascent(L2(), step_size=radius)), FreeLB(steps=2))
