"""Adversarial weight perturbation."""

from __future__ import annotations

from dataclasses import replace

from advvl.perturbers.weights import WeightAscent
from advvl.recipes.parts import check_method
from advvl.training import AdversarialTraining


def awp(method: AdversarialTraining, *, gamma: float = 5e-3) -> AdversarialTraining:
    """AWP around a method: its gradient at θ + v, vₗ = γ‖θₗ‖·gₗ/‖gₗ‖ for each matrix or kernel, g its gradient at θ.

    As in `awp(pgd(radius=…, step_size=…))` or `awp(trades(…))`. Wu et al., "Adversarial Weight Perturbation Helps
    Robust Generalization", NeurIPS 2020. Its code moves a second copy of the model, and restores weights by subtracting
    v.
    """
    check_method(method)
    chosen = WeightAscent(gamma, per="tensor", relative=True, chosen=lambda name, parameter: parameter.ndim > 1)
    return replace(method, weights=chosen)
