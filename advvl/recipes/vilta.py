"""ViLTA, a reconstruction."""

from __future__ import annotations

from dataclasses import replace

from advvl.checks import is_number, shown
from advvl.errors import ConfigurationError
from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.unperturbed import Unperturbed
from advvl.recipes.parts import check_method, check_positive
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
) -> AdversarialTraining:
    """ViLTA's masked-word loss, a reconstruction: (1−α)·CE + α·(−Σ q log p), q = softmax(teacher/τ), or its top k.

    Wang et al., "ViLTA: Enhancing Vision-Language Pre-training through Textual Augmentation", ICCV 2023, of which only
    the abstract was available. `adversary`, such as `villa()`, perturbs the same loss; None: nothing is perturbed. Use
    it for batches of masked words only, because the logits of other tasks would get soft labels too; give `fit` a
    method for each task. The synthesised negatives are in `advvl.tasks.uniter.synthesised`.
    """
    if not is_number(alpha) or not 0 < alpha <= 1:
        raise ConfigurationError(f"expected alpha to be a number in (0, 1], got {shown(alpha)}")
    base = AdversarialTraining(Unperturbed(), FreeLB(1)) if adversary is None else adversary
    check_method(base)
    scale = base.teach.penalty  # of all regularisers, of which the soft labels are one
    check_positive("the adversary's teach.penalty", scale)
    soft = SoftCrossEntropy(alpha, reference=teacher, temperature=temperature, top_k=top_k)
    weights: dict[Side, float] = {"perturbed": base.teach.task, "clean": base.clean_weight}
    terms = (replace(soft, weight=alpha * weight / scale, on=on) for on, weight in weights.items() if weight)
    rest, teach = (1 - alpha) * base.clean_weight, replace(base.teach, task=(1 - alpha) * base.teach.task)
    return replace(base, regularizer=(*base.regularizers, *terms), clean_weight=rest, teach=teach)
