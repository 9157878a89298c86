"""LXMERT for NLVR2: is a sentence true of two pictures?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.lxmert.configuration_lxmert import LxmertConfig

from advvl.errors import DataError, ShapeError
from advvl.models.lxmert.layout import IMAGES
from advvl.tasks.lxmert.base import LxmertWithAnswers


def nlvr2_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of true (1) and false (0), `(B,)`.

    Raises:
        ShapeError, DataError: targets that are not `(B,)` of whole numbers.
    """
    if targets.shape != logits.shape[:1]:
        raise ShapeError(
            f"expected targets of shape (B,) = {tuple(logits.shape[:1])}, got {tuple(targets.shape)}; give one for each "
            "sentence, not for each of its images"
        )
    if targets.is_floating_point():
        raise DataError(
            f"expected targets of whole numbers, 1 for a true sentence, got {targets.dtype}; give classes, not scores"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets.long(), reduction="none")


class LxmertForNLVR2(LxmertWithAnswers):  # type: ignore[no-untyped-call]
    """LXMERT that judges a sentence about two images: a head of two layers over both pooled first tokens, concatenated.

    LXMERT runs on 2B rows: each sentence with its first image, then with its second. So the sites see 2B rows, and the
    two copies of a sentence have separate perturbations, as published. Scores are of false and true, `(B, 2)`;
    `targets` are 1 for a true sentence, `(B,)`.
    """

    _images = (IMAGES,)
    _losses = staticmethod(nlvr2_losses)

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config)
        self.answer_head = _PairHead(config)
        self.post_init()  # type: ignore[no-untyped-call]


class _PairHead(nn.Module):
    """As `LxmertVisualAnswerHead`, over the pooled vectors of two images: from `(B, 2H)` to `(B, 2)`."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__()
        width = IMAGES * config.hidden_size
        self.logit_fc = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12), nn.Linear(width, 2)
        )

    def forward(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.logit_fc(pooled)
        return logits
