"""Tasks on transformers' LXMERT (Tan & Bansal, EMNLP 2019): VQA and GQA by one answer head, NLVR2 by two images a sentence.

Both are models of transformers: `from_pretrained` and `save_pretrained` work, and every name is that of transformers'
`LxmertForQuestionAnswering`. Legend: B rows, T tokens, R regions, F features, A answers, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.lxmert.configuration_lxmert import LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertModel, LxmertPreTrainedModel, LxmertVisualAnswerHead
from transformers.utils.generic import ModelOutput

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.lxmert_layout import IMAGES, twice
from advvl.tasks.vqa import vqa_losses


@dataclass
class LxmertTaskOutput(ModelOutput):
    """What a task's LXMERT returns.

    Arguments:
        loss: one a row, `(B,)`; None without targets.
        logits: `(B, A)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class _LxmertWithAnswers(LxmertPreTrainedModel):  # type: ignore[no-untyped-call]
    """LXMERT and a head over pooled first tokens."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config)
        self.lxmert = LxmertModel(config)
        self._freeze_unseen()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, whose loading makes every parameter require grad."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: _LxmertWithAnswers = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_unseen()
        return loaded

    def _freeze_unseen(self) -> None:
        """Freeze what the pooled token never sees: parameters that no backward reaches keep DDP waiting."""
        for layer in self.lxmert.encoder.x_layers[-1:]:
            for unseen in (layer.visn_self_att, layer.visn_inter, layer.visn_output):
                unseen.requires_grad_(False)

    def _pooled(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        visual_feats: Tensor,
        visual_pos: Tensor,
        visual_attention_mask: Tensor | None,
    ) -> Tensor:
        """From text `(N, T)` and regions `(N, R, …)` to `(N, H)`."""
        pooled: Tensor = self.lxmert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            visual_feats=visual_feats,
            visual_pos=visual_pos,
            visual_attention_mask=visual_attention_mask,
            return_dict=True,
        ).pooled_output
        return pooled


class LxmertForVQA(_LxmertWithAnswers):  # type: ignore[no-untyped-call]
    """LXMERT that answers questions, VQA's or GQA's: a head of two layers over the pooled first token.

    Arguments:
        config: `num_qa_labels` is A, how many answers are told apart (VQA 3129, GQA 1842).

    Raises:
        ConfigurationError: no answer.
    """

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config)
        if config.num_qa_labels < 1:
            raise ConfigurationError(f"expected num_qa_labels of 1 or more, got {config.num_qa_labels!r}")
        self.answer_head = LxmertVisualAnswerHead(config, config.num_qa_labels)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> LxmertTaskOutput:
        """Scores of the answers `(B, A)`, and with `targets` each row's loss `(B,)`; its mean is the published loss.

        Arguments:
            input_ids, attention_mask, token_type_ids: `(B, T)`; a mask of None: all are real; types of None: 0.
            visual_feats, visual_pos: features `(B, R, F)` and boxes `(B, R, 4)` (x1, y1, x2, y2, as parts of the image's).
            visual_attention_mask: `(B, R)`; None: all are real.
            targets: soft scores in [0, 1], `(B, A)`.

        Raises:
            DataError: a field that is missing, or of integers where numbers are due.
            ShapeError: a field of another shape.
        """
        input_ids, feats, pos = _given(input_ids=input_ids, visual_feats=visual_feats, visual_pos=visual_pos)
        rows, regions = input_ids.shape[0], feats.shape[1:2]
        _check_regions(feats, pos, (rows, *regions), self.config, "B, R")
        pooled = self._pooled(input_ids, attention_mask, token_type_ids, feats, pos, visual_attention_mask)
        logits: Tensor = self.answer_head(pooled)
        return LxmertTaskOutput(loss=None if targets is None else vqa_losses(logits, targets), logits=logits)


class LxmertForNLVR2(_LxmertWithAnswers):  # type: ignore[no-untyped-call]
    """LXMERT that judges a sentence about two images: a head of two layers over both pooled first tokens, side by side.

    LXMERT runs on 2B rows: each sentence with its first image, then with its second. So the sites see 2B rows, and both
    copies of a sentence have perturbations of their own, as published.
    """

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config)
        self.answer_head = _PairHead(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> LxmertTaskOutput:
        """Scores of false and true `(B, 2)`, and with `targets` each row's cross-entropy `(B,)`.

        Arguments:
            input_ids, attention_mask, token_type_ids: `(B, T)`, as `LxmertForVQA.forward`.
            visual_feats, visual_pos: features `(B, 2, R, F)` and boxes `(B, 2, R, 4)`.
            visual_attention_mask: `(B, 2, R)`; None: all are real.
            targets: 1 for a true sentence, `(B,)`.

        Raises:
            DataError: a field that is missing, or of other numbers.
            ShapeError: a field of another shape.
        """
        input_ids, feats, pos = _given(input_ids=input_ids, visual_feats=visual_feats, visual_pos=visual_pos)
        rows, regions = input_ids.shape[0], feats.shape[2:3]
        _check_regions(feats, pos, (rows, IMAGES, *regions), self.config, "B, 2, R")
        pooled = self._pooled(
            twice(input_ids),
            None if attention_mask is None else twice(attention_mask),
            None if token_type_ids is None else twice(token_type_ids),
            feats.flatten(0, 1),
            pos.flatten(0, 1),
            None if visual_attention_mask is None else visual_attention_mask.flatten(0, 1),
        )
        logits: Tensor = self.answer_head(pooled.reshape(rows, IMAGES * pooled.shape[1]))
        return LxmertTaskOutput(loss=None if targets is None else nlvr2_losses(logits, targets), logits=logits)


def nlvr2_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of true (1) and false (0), `(B,)`.

    Raises:
        ShapeError, DataError: targets that are not `(B,)` of whole numbers.
    """
    if targets.shape != logits.shape[:1]:
        raise ShapeError(f"expected targets of shape (B,) = {tuple(logits.shape[:1])}, got {tuple(targets.shape)}")
    if targets.is_floating_point():
        raise DataError(f"expected targets of whole numbers, 1 for a true sentence, got {targets.dtype}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets.long(), reduction="none")


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


def _given(**fields: Tensor | None) -> list[Tensor]:
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        raise DataError(
            f"expected the fields {', '.join(fields)} in the batch, got no {', '.join(missing)}; words are given as "
            "input_ids (B, T), regions as visual_feats and visual_pos"
        )
    return [value for value in fields.values() if value is not None]


def _check_regions(feats: Tensor, pos: Tensor, axes: tuple[int, ...], config: LxmertConfig, letters: str) -> None:
    for name, value, last in (
        ("visual_feats", feats, config.visual_feat_dim),
        ("visual_pos", pos, config.visual_pos_dim),
    ):
        if not value.is_floating_point():
            raise DataError(f"expected {name} of floating-point numbers, got {value.dtype}")
        if value.shape != (*axes, last):
            raise ShapeError(
                f"expected {name} of shape ({letters}, {last}) = {(*axes, last)}, got {tuple(value.shape)}"
            )
