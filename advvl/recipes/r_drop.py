"""R-Drop."""

from __future__ import annotations

from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.unperturbed import Unperturbed
from advvl.recipes.parts import check_positive
from advvl.regularizers.kl import SymmetricKL
from advvl.training import AdversarialTraining


def r_drop(alpha: float = 1.0) -> AdversarialTraining:
    """R-Drop: L₁ + L₂ + α·½ (KL(p₁‖p₂) + KL(p₂‖p₁)) of two passes that differ by their dropout masks alone.

    Liang et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021. A model without dropout gets no penalty.
    """
    check_positive("alpha", alpha)
    return AdversarialTraining(Unperturbed(), FreeLB(1), SymmetricKL(alpha / 2), clean_weight=1.0)
