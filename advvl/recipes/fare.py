"""FARE."""

from __future__ import annotations

from torch import nn

from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import image_embedding, perturber_at, steepest
from advvl.regularizers.base import Readout
from advvl.regularizers.distance import SquaredDistance
from advvl.regularizers.references import Frozen, Reference
from advvl.training import AdversarialTraining


def fare(
    model: nn.Module,
    *,
    radius: float,
    step_size: float,
    steps: int = 10,
    reads: Readout = image_embedding,
    modality: str = "image",
    box: tuple[float, float] | None = (0.0, 1.0),
    pixels: Normalised | None = None,
    reference: Reference | None = None,
) -> AdversarialTraining:
    """FARE: ‖φ(x + δ) − φ₀(x)‖², climbed and taught, without labels; φ₀ is the model as it is now, copied.

    Where a LoRA adapter is trained, `reference=AdapterOff()` takes φ₀ from the model itself, without a copy.
    Schlarmann et al., "Robust CLIP", ICML 2024. Its code keeps a momentum of signs (0.9), which matters only where a
    gradient is zero, and does not project its start into the box. Pixels are raw, as for `PixelInput`.
    """
    ascent = steepest("linf", radius, step_size=step_size, start=Uniform(radius), box=box, pixels=pixels)
    distance = SquaredDistance(reads=reads, reference=reference or Frozen.copy_of(model))
    perturber, objective = perturber_at(modality, ascent), Objective(task=0.0)
    return AdversarialTraining(perturber, PGD(steps), distance, teach=objective)
