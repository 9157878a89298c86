"""Referring expressions: which region of an image does a text refer to?"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl.checks import is_choice, is_number, positive
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.model import HIDDEN_SCORE, UniterConfig, UniterModel, UniterOutput, given, initialise
from advvl.models.uniter.model import region_mask as real_regions
from advvl.models.uniter.model import text_mask as real_words
from advvl.models.uniter.task import UniterTask, freeze
from advvl.runtime.reading import readable
from advvl.tasks.losses import class_targets

RegionLoss = Literal["cls", "rank"]


class UniterForReferringExpressions(UniterTask):
    """UNITER and a score of each region's last state (published code, `model/re.py`).

    Padded regions have a score of -10,000, which no softmax sees and nothing flows into.

    Arguments:
        mlp: layers of the head, 1 or 2.
        loss: "cls" is a softmax over the regions, "rank" a margin between the probability of the region that is meant, the
            sigmoid of its score, and that of a wrong one, by `draw_regions`.
        margin, hard_ratio: of "rank"; how often the wrong region is the one of the highest score.

    Raises:
        ConfigurationError: another head or loss, a margin that is not above 0, a ratio outside [0, 1].
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields - {"img_masks"} | {"targets", "obj_masks", "negatives"}

    def __init__(
        self,
        config: UniterConfig,
        *,
        mlp: Literal[1, 2] = 1,
        loss: RegionLoss = "cls",
        margin: float = 0.2,
        hard_ratio: float = 0.3,
    ) -> None:
        super().__init__(config)
        if mlp not in (1, 2):
            raise ConfigurationError(f"expected mlp of 1 or 2 layers, got {mlp!r}")
        if not is_choice(loss, get_args(RegionLoss)):
            raise ConfigurationError(f"expected loss to be one of {get_args(RegionLoss)}, got {loss!r}")
        if not is_number(hard_ratio) or not 0 <= hard_ratio <= 1:
            raise ConfigurationError(f"expected hard_ratio in [0, 1], got {hard_ratio!r}")
        self.loss, self.margin, self.hard_ratio = loss, margin, hard_ratio
        positive(self, "margin")
        width = config.hidden_size
        self.re_output: nn.Module = nn.Linear(width, 1)
        if mlp == 2:
            layers = nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.re_output = nn.Sequential(*layers, nn.Linear(width, 1))
        initialise(self.re_output, config)
        freeze(self.uniter.pooler, self.uniter.img_embeddings.mask_embedding)

    def forward(
        self,
        *,
        targets: Tensor | None = None,
        obj_masks: Tensor | None = None,
        negatives: Tensor | None = None,
        **fields: Tensor,
    ) -> UniterOutput:
        """Scores of the regions `(B, R)`, and with `targets` each row's loss `(B,)`.

        Arguments:
            targets: the region that is meant, `(B,)` or `(B, 1)`.
            obj_masks: 1 at padded regions, `(B, R)`; None: those beyond each row's own.
            negatives: for "rank", the wrong region of each row, `(B,)`; None: drawn from torch's own generator.
            fields: those of `UniterModel.forward`.

        Raises:
            ShapeError, DataError: targets, masks or negatives that do not fit.
        """
        hidden = given("last_hidden_state", self.uniter(**fields).last_hidden_state)
        words, regions = real_words(fields), real_regions(fields)
        first = words.sum(1, keepdim=True)
        places = (first + torch.arange(regions.shape[1], device=hidden.device)).clamp(max=hidden.shape[1] - 1)
        states = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        real = regions if obj_masks is None else _shaped("obj_masks", obj_masks, regions) == 0
        logits: Tensor = self.re_output(states).squeeze(-1).masked_fill(~real, HIDDEN_SCORE)
        if targets is None:
            return UniterOutput(logits=logits)
        targets = class_targets(logits, targets)
        if readable(targets) and not real.gather(1, targets[:, None]).all():
            rows = (~real.gather(1, targets[:, None])[:, 0]).nonzero()[:, 0].tolist()
            raise DataError(
                f"expected targets among the real regions, got padding in rows {rows[:10]}; correct targets"
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.loss == "cls":
            losses = F.cross_entropy(wide, targets, reduction="none")
        else:
            if negatives is None:
                negatives = draw_regions(logits, targets, real, hard_ratio=self.hard_ratio)
            chances = wide.sigmoid().gather(1, torch.stack([targets, class_targets(logits, negatives)], 1))
            losses = (self.margin + chances[:, 1] - chances[:, 0]).clamp(min=0)
        return UniterOutput(loss=losses, losses=losses, logits=logits)


@torch.no_grad()
def draw_regions(
    scores: Tensor, targets: Tensor, real: Tensor, *, hard_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """A wrong region of each row, `(B,)`: the one of the highest score, or a uniformly drawn one.

    Arguments:
        scores: of the regions, `(B, R)`.
        targets: the region that is meant, `(B,)`.
        real: `(B, R)` bool, False at padding.
        hard_ratio: how often it is the one of the highest score.
        generator: of the scores' device; None: torch's own.

    Raises:
        DataError: a row with one region, which has no wrong one.
    """
    wrong = real.scatter(1, targets[:, None], False)
    if not wrong.any(1).all():
        rows = (~wrong.any(1)).nonzero()[:, 0].tolist()
        raise DataError(
            f"expected two regions or more in each row, to rank one above another, got one in rows {rows[:10]}; leave "
            'them out, or use loss="cls"'
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    chances = torch.rand(scores.shape, dtype=scores.dtype, generator=generator, device=scores.device)
    hard = torch.rand(len(scores), generator=generator, device=scores.device) < hard_ratio
    order = torch.where(hard[:, None], scores, chances)
    return order.masked_fill(~wrong, -math.inf).argmax(1)


def _shaped(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    if value.shape != wanted.shape:
        raise ShapeError(f"expected {name} of shape (B, R) = {tuple(wanted.shape)}, got {tuple(value.shape)}")
    return value
