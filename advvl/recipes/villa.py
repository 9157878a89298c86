"""Published methods, as the few parts that they are. Each returns an ordinary `AdversarialTraining`.

Arguments that mean the same everywhere: `step_sizes`, modality to the length of one ascent step in the units of its
embedding; `radius` of the ball, in the same units (`math.inf`: none); `norm` of ball and step, `"l2"` or `"linf"`;
`box`, (low, high) bounds of the perturbed tensor itself, for pixels. What makes no sense raises ConfigurationError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from advvl.balls import L2, Ball, Linf
from advvl.errors import ConfigurationError
from advvl.maximizers import PGD, FreeAT, FreeLB, Order
from advvl.ops import Norm
from advvl.perturbers import Ascent, EmbeddingPerturber, Start, Uniform, Zero
from advvl.regularizers import SymmetricKL
from advvl.training import AdversarialTraining

LxmertTask = Literal["vqa", "gqa", "nlvr2"]

_PUBLISHED_FLOOR = 1e-8  # under the gradient's norm, in VILLA's and FreeLB's code


def villa(
    *,
    step_sizes: dict[str, float] | None = None,
    steps: int = 3,
    radius: float = math.inf,
    kl_weight: float = 1.5,
    norm: Norm = "l2",
    modalities: Order = "together",
    clean_weight: float = 0.0,
    dropout: Literal["fresh", "shared"] = "fresh",
) -> AdversarialTraining:
    """VILLA's fine-tuning as released: K passes, symmetric KL into both branches, starts at zero, no projection.

    Gan et al., "Large-Scale Adversarial Training for Vision-and-Language Representation Learning", NeurIPS 2020. The
    defaults are those of its VQA-base configuration. Its paper's Algorithm 1 perturbs one modality at a time and keeps a
    clean term: `villa(step_sizes=…, modalities="in turn", clean_weight=0.5, radius=…)`, the paper's objective halved.
    """
    steps_of = {"text": 1e-3} if step_sizes is None else step_sizes
    return AdversarialTraining(
        _perturber(steps_of, _ball(norm, radius), Zero()),
        FreeLB(steps, modalities),
        SymmetricKL(kl_weight),
        clean_weight=clean_weight,
        dropout=dropout,
    )


def lxmert_adv(task: LxmertTask = "vqa", *, dropout: Literal["fresh", "shared"] = "fresh") -> AdversarialTraining:
    """LXMERT-AdvTrain as released: VILLA's fine-tuning on words alone, K = 3, L2, no radius.

    Gan et al., NeurIPS 2020; Tan & Bansal, "LXMERT: Learning Cross-Modality Encoder Representations from Transformers",
    EMNLP 2019. NLVR2's KL term is a mean over both classes too, hence half the weight. Around it, for a model of 768:

    | task | batch | learning rate | epochs | step size | KL weight here |
    |---|---|---|---|---|---|
    | vqa | 32 | 5e-5 | 4 | 1e-3 | 1.5 |
    | gqa | 32 | 1e-5 | 4 | 1e-2 | 1.5 |
    | nlvr2 | 32 | 5e-5 | 4 | 1e-3 | 0.75 |

    with `advvl.bert_adam`'s optimiser and schedule, and gradients clipped at norm 5.
    """
    if task not in get_args(LxmertTask):
        raise ConfigurationError(f"expected task to be one of {get_args(LxmertTask)}, got {task!r}")
    return villa(
        step_sizes={"text": 1e-2 if task == "gqa" else 1e-3},
        kl_weight=0.75 if task == "nlvr2" else 1.5,
        dropout=dropout,
    )


def freelb(
    *,
    step_sizes: dict[str, float] | None = None,
    steps: int = 3,
    init_magnitude: float = 0.0,
    radius: float = math.inf,
    norm: Norm = "l2",
    modalities: Order = "together",
    dropout: Literal["fresh", "shared"] = "fresh",
) -> AdversarialTraining:
    """FreeLB: K passes whose parameter gradients add up while the perturbation climbs; `steps` counts passes.

    Zhu et al., "FreeLB: Enhanced Adversarial Training for Natural Language Understanding", ICLR 2020. Its fairseq code
    counts moves instead: `--adv-steps s` is `steps=s+1` here.
    """
    steps_of = {"text": 1e-1} if step_sizes is None else step_sizes
    start: Start = Uniform(init_magnitude) if init_magnitude else Zero()
    return AdversarialTraining(
        _perturber(steps_of, _ball(norm, radius), start), FreeLB(steps, modalities), dropout=dropout
    )


def free_at(
    *,
    radius: float,
    modality: str = "image",
    replays: int = 8,
    box: tuple[float, float] | None = None,
    carry: bool = True,
) -> AdversarialTraining:
    """Free adversarial training: sign steps of the radius's own size, one update a replay, the perturbation carried.

    Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019. `step` needs `update=` and, to carry, `state=`.
    """
    ascent = Ascent(Linf(radius), step_size=radius, rule="sign", box=box)
    return AdversarialTraining(EmbeddingPerturber(**{modality: ascent}), FreeAT(replays, carry=carry))


def pgd(
    *,
    radius: float,
    step_size: float,
    steps: int = 7,
    modality: str = "image",
    norm: Norm = "linf",
    box: tuple[float, float] | None = None,
) -> AdversarialTraining:
    """PGD adversarial training: S moves from a random start, then one pass to learn from.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    ascent = Ascent(
        _ball(norm, radius),
        step_size=step_size,
        start=Uniform(radius),
        rule="sign" if norm == "linf" else "normalised",
        box=box,
    )
    return AdversarialTraining(EmbeddingPerturber(**{modality: ascent}), PGD(steps))


def _ball(norm: Norm, radius: float) -> Ball:
    if norm not in get_args(Norm):
        raise ConfigurationError(f"expected norm to be one of {get_args(Norm)}, got {norm!r}")
    return L2(radius) if norm == "l2" else Linf(radius)


def _perturber(step_sizes: dict[str, float], ball: Ball, start: Start) -> EmbeddingPerturber:
    if not isinstance(step_sizes, Mapping):
        raise ConfigurationError(
            f'expected step_sizes as a mapping from modality to step size, as in {{"text": 0.1}}, got {step_sizes!r}'
        )
    return EmbeddingPerturber(
        **{
            modality: Ascent(ball, step_size=step_size, start=start, floor=_PUBLISHED_FLOOR)
            for modality, step_size in step_sizes.items()
        }
    )
