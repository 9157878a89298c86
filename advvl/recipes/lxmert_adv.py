"""LXMERT-AdvTrain."""

from __future__ import annotations

from typing import Literal, get_args

from advvl.checks import is_choice
from advvl.errors import ConfigurationError
from advvl.recipes.villa import villa
from advvl.training import AdversarialTraining

LxmertTask = Literal["vqa", "gqa", "nlvr2"]


def lxmert_adv(task: LxmertTask = "vqa", *, dropout: Literal["fresh", "shared"] = "fresh") -> AdversarialTraining:
    """LXMERT-AdvTrain as released: VILLA's fine-tuning on words alone, K = 3, L2, no radius.

    Gan et al., NeurIPS 2020; Tan & Bansal, "LXMERT: Learning Cross-Modality Encoder Representations from Transformers",
    EMNLP 2019. NLVR2's KL term is a mean over both classes too, hence half the weight. Around it, for a model of 768:

    | task | batch | learning rate | epochs | step size | KL weight here |
    |---|---|---|---|---|---|
    | vqa | 32 | 5e-5 | 4 | 1e-3 | 1.5 |
    | gqa | 32 | 1e-5 | 4 | 1e-2 | 1.5 |
    | nlvr2 | 32 | 5e-5 | 4 | 1e-3 | 0.75 |

    with `advvl.fit.bert_adam`'s optimiser and schedule, and gradients clipped at norm 5.
    """
    if not is_choice(task, get_args(LxmertTask)):
        raise ConfigurationError(f"expected task to be one of {get_args(LxmertTask)}, got {task!r}")
    return villa(
        step_sizes={"text": 1e-2 if task == "gqa" else 1e-3},
        kl_weight=0.75 if task == "nlvr2" else 1.5,
        dropout=dropout,
    )
