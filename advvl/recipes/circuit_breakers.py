"""Circuit breakers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from advvl.adapters.injection import Batch
from advvl.checks import is_number
from advvl.errors import ConfigurationError
from advvl.maximizers.freelb import FreeLB
from advvl.passes.objective import Objective
from advvl.perturbers.unperturbed import Unperturbed
from advvl.recipes.parts import check_masks, check_names, check_positive
from advvl.regularizers.distance import Alignment, Distance
from advvl.regularizers.references import AdapterOff, Reference
from advvl.training import AdversarialTraining


def circuit_breakers(
    layers: Sequence[str],
    *,
    harmful: Callable[[Batch], Tensor],
    retained: Callable[[Batch], Tensor],
    progress: float,
    alpha: float = 10.0,
    reference: Reference | None = None,
) -> AdversarialTraining:
    """Circuit breakers: α(1 − t/2)·max(0, cos(h, h₀)) at harmful tokens + α·t/2·‖h − h₀‖ at retained ones.

    h are the outputs of `layers`, whose mean is taken, h₀ those with the LoRA adapter off (or of `reference`); t runs from 0
    to 1. `harmful` and `retained` give the masks `(B, T)` of their tokens. Zou et al., "Improving Alignment and Robustness
    with Circuit Breakers", NeurIPS 2024. Nothing is perturbed; embedding attacks have broken it (Schwinn & Geisler, 2024).
    """
    if not is_number(progress) or not 0 <= progress <= 1:
        raise ConfigurationError(f"expected progress as the share of training done, in [0, 1], got {progress!r}")
    check_names("layers", layers)
    check_positive("alpha", alpha)
    check_masks(harmful=harmful, retained=retained)
    origin, each = AdapterOff() if reference is None else reference, alpha / max(len(layers), 1)
    away = [Alignment(each * (1 - progress / 2), reads=name, reference=origin, rows=harmful) for name in layers]
    near = [Distance(each * progress / 2, reads=name, reference=origin, rows=retained) for name in layers if progress]
    return AdversarialTraining(Unperturbed(), FreeLB(1), (*away, *near), teach=Objective(task=0.0))
