"""ViLTA, a reconstruction."""

from __future__ import annotations

from dataclasses import replace

from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.starts import Uniform
from advvl.recipes.parts import perturber_at
from advvl.regularizers.base import Side
from advvl.regularizers.references import Reference
from advvl.regularizers.soft_labels import SoftCrossEntropy
from advvl.training import AdversarialTraining


def vilta(
    teacher: Reference,
    *,
    alpha: float = 0.4,
    temperature: float = 1.0,
    top_k: int | None = None,
    adversary: AdversarialTraining | None = None,
    modality: str = "text",
) -> AdversarialTraining:
    """ViLTA's masked-word loss, a reconstruction: (1−α)·CE + α·(−Σ q log p), q = softmax(teacher/τ), or its top k.

    Wang et al., "ViLTA: Enhancing Vision-Language Pre-training through Textual Augmentation", ICCV 2023, of which the
    abstract alone was at hand. `adversary`, such as `villa()`, perturbs the same loss; None: nothing is perturbed, and
    `modality` is a site that the model has. The synthesised negatives are `advvl.tasks.uniter.synthesised`.
    """
    still = Ascent(L2(), step_size=0.0, start=Uniform(0.0), allow_zero_step=True)
    base = adversary or AdversarialTraining(perturber_at(modality, still), FreeLB(1))
    soft = SoftCrossEntropy(alpha, reference=teacher, temperature=temperature, top_k=top_k)
    weights: dict[Side, float] = {"perturbed": base.teach.task, "clean": base.clean_weight}
    terms = (replace(soft, weight=alpha * weight, on=on) for on, weight in weights.items() if weight)
    rest, teach = (1 - alpha) * base.clean_weight, replace(base.teach, task=(1 - alpha) * base.teach.task)
    return replace(base, regularizer=(*base.regularizers, *terms), clean_weight=rest, teach=teach)
