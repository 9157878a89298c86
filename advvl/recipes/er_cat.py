"""Embedding-regularised continuous adversarial training of language models, a reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from advvl.adapters.injection import Batch
from advvl.adapters.outputs import Outputs
from advvl.passes.objective import Objective
from advvl.recipes.answers import away, of_pairs, toward
from advvl.recipes.cat import cat
from advvl.recipes.parts import check_matrix, check_positive
from advvl.training import AdversarialTraining


def er_cat(
    table: Tensor | Callable[[], Tensor],
    *,
    radius: float,
    step_size: float = 1e-4,
    steps: int = 10,
    weight: float = 0.5,
    modality: str = "text",
) -> AdversarialTraining:
    """ER-CAT, a reconstruction: what `cat` teaches + λ times the variance of the embedding matrix's singular values.

    `table` is that matrix `(V, D)`, or a function without arguments that returns it as it is now. δ climbs as in `cat`.
    Fu and Wang, "Understanding and Improving Continuous Adversarial Training for LLMs via In-Context Learning Theory",
    ICLR 2026. Its abstract, summaries and settings (λ = 0.5) were available, not its formula.
    """
    check_positive("weight", weight)

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        matrix = table() if callable(table) else table
        check_matrix("table", matrix)
        sizes: Tensor = torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
        return of_pairs(away, toward)(outputs, batch) + weight * sizes.var(correction=0)

    return replace(cat(radius=radius, step_size=step_size, steps=steps, modality=modality), teach=Objective(loss=loss))
