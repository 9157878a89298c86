"""Sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import replace

from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.unperturbed import Unperturbed
from advvl.perturbers.weights import WeightAscent
from advvl.recipes.parts import check_method
from advvl.training import AdversarialTraining


def sam(method: AdversarialTraining | None = None, *, rho: float = 0.05) -> AdversarialTraining:
    """SAM: the gradient at θ + ρ·g/‖g‖, g the gradient at θ over all weights; for plain training or around a method.

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021. A popular port for
    PyTorch adds 1e-12 to the norm and leaves the user to keep BatchNorm's statistics; here `track_stats` works as in
    other methods.
    """
    plain = AdversarialTraining(Unperturbed(), FreeLB(1)) if method is None else method
    check_method(plain)
    return replace(plain, weights=WeightAscent(rho))
