"""Continuous adversarial preference optimisation of language models."""

from __future__ import annotations

from dataclasses import replace

from advvl.passes.objective import Objective
from advvl.recipes.answers import ipo
from advvl.recipes.cat import cat
from advvl.recipes.parts import check_positive
from advvl.training import AdversarialTraining


def capo(
    *, radius: float, step_size: float = 1e-4, steps: int = 10, beta: float = 0.25, modality: str = "text"
) -> AdversarialTraining:
    """CAPO: IPO, (h − 1/(2β))², under the perturbation of `cat`; h compares both answers' log-ratios to a reference.

    h = log p(given | x + δ)/p₀(given | x) − log p(shunned | x + δ)/p₀(shunned | x), means over tokens. Batches are
    those of `cat` with `reference_logps` `(B,)`, the mean log-probability of each answer under the reference on clean
    inputs: what `advvl.recipes.answers.forcing` gives for its outputs. Xhonneux et al., "Efficient Adversarial Training
    in LLMs with Continuous Attacks", NeurIPS 2024. Its code also cuts off log-probabilities, in a way not known to us.
    """
    check_positive("beta", beta)
    base = cat(radius=radius, step_size=step_size, steps=steps, modality=modality)
    return replace(base, teach=Objective(loss=ipo(beta)))
