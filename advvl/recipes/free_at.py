"""Free adversarial training."""

from __future__ import annotations

from advvl.maximizers.free_at import FreeAT
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import Linf
from advvl.perturbers.pixels import Normalised
from advvl.recipes.parts import perturber_at
from advvl.training import AdversarialTraining


def free_at(
    *,
    radius: float,
    modality: str = "image",
    replays: int = 8,
    box: tuple[float, float] | None = None,
    pixels: Normalised | None = None,
    carry: bool = True,
) -> AdversarialTraining:
    """Free adversarial training: sign steps as long as the radius, one update per replay, and a carried perturbation.

    Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019. `step` needs `update=` and, to carry, `state=`.
    """
    ascent = Ascent(Linf(radius), step_size=radius, rule="sign", box=box, pixels=pixels)
    return AdversarialTraining(perturber_at(modality, ascent), FreeAT(replays, carry=carry))
