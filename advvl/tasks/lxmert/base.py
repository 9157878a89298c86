"""Tasks on transformers' LXMERT (Tan & Bansal, EMNLP 2019): VQA and GQA with one answer head, NLVR2 with two images.

Both are models of transformers: `from_pretrained` and `save_pretrained` work, and every name is that of transformers'
`LxmertForQuestionAnswering`. Legend: B rows, T tokens, R regions, F features, A answers, H width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.lxmert.configuration_lxmert import LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertModel, LxmertPreTrainedModel
from transformers.utils.generic import ModelOutput

from advvl.errors import DataError, ShapeError
from advvl.models.lxmert.layout import twice


@dataclass
class LxmertTaskOutput(ModelOutput):
    """The outputs of a task's LXMERT.

    Arguments:
        loss: one per row, `(B,)`; None without targets.
        logits: `(B, A)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class LxmertWithAnswers(LxmertPreTrainedModel):  # type: ignore[no-untyped-call]
    """LXMERT and `answer_head` over the pooled first tokens of an example's rows, side by side."""

    _images: ClassVar[tuple[int, ...]] = ()  # the axis of an example's images, where it has several
    answer_head: nn.Module

    @staticmethod
    @abstractmethod
    def _losses(logits: Tensor, targets: Tensor) -> Tensor:
        """From `(B, A)` and targets to one loss per row, `(B,)`."""

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config)
        self.lxmert = LxmertModel(config)
        self._freeze_unseen()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, whose loading makes every parameter require grad."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: LxmertWithAnswers = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_unseen()
        return loaded

    def _freeze_unseen(self) -> None:
        """Freeze parameters that the pooled token does not depend on: without a gradient they keep DDP waiting."""
        for layer in self.lxmert.encoder.x_layers[-1:]:
            for unseen in (layer.visn_self_att, layer.visn_inter, layer.visn_output):
                unseen.requires_grad_(False)

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
        """Scores of the answers `(B, A)`, and with `targets` each row's loss `(B,)`.

        Arguments:
            input_ids, attention_mask, token_type_ids: `(B, T)`; a mask of None: all are real; types of None: 0.
            visual_feats, visual_pos: features `(B, R, F)` and boxes `(B, R, 4)` (x1, y1, x2, y2, relative to the
                image); for pairs of images `(B, 2, R, F)` and `(B, 2, R, 4)`.
            visual_attention_mask: `(B, R)`, or `(B, 2, R)`; None: all are real.
            targets: as described by the class.

        Raises:
            DataError: a field that is missing, or of other numbers.
            ShapeError: a field of another shape.
        """
        input_ids, feats, pos = _given(input_ids=input_ids, visual_feats=visual_feats, visual_pos=visual_pos)
        rows, last = len(input_ids), len(self._images)
        _check_regions(feats, pos, (rows, *self._images), self.config)

        def words(x: Tensor | None) -> Tensor | None:
            return twice(x) if x is not None and self._images else x

        pooled: Tensor = self.lxmert(
            input_ids=words(input_ids),
            attention_mask=words(attention_mask),
            token_type_ids=words(token_type_ids),
            visual_feats=feats.flatten(0, last),
            visual_pos=pos.flatten(0, last),
            visual_attention_mask=None if visual_attention_mask is None else visual_attention_mask.flatten(0, last),
            return_dict=True,
        ).pooled_output
        logits: Tensor = self.answer_head(pooled.reshape(rows, math.prod(self._images) * pooled.shape[1]))
        return LxmertTaskOutput(loss=None if targets is None else self._losses(logits, targets), logits=logits)


def _given(**fields: Tensor | None) -> list[Tensor]:
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        raise DataError(
            f"expected the fields {', '.join(fields)} in the batch, got no {', '.join(missing)}; "
            "give words as input_ids, regions as visual_*"
        )
    return [value for value in fields.values() if value is not None]


def _check_regions(feats: Tensor, pos: Tensor, images: tuple[int, ...], config: LxmertConfig) -> None:
    """Raise unless features and boxes have a row for each of R regions of each of the images, `(B,)` or `(B, 2)`."""
    axes = (*images, *feats.shape[len(images) : len(images) + 1])
    letters = ", ".join(["B", *map(str, images[1:]), "R"])
    for name, value, last in (
        ("visual_feats", feats, config.visual_feat_dim),
        ("visual_pos", pos, config.visual_pos_dim),
    ):
        if not value.is_floating_point():
            raise DataError(
                f"expected {name} of floating-point numbers, got {value.dtype}; convert them, as by .float()"
            )
        if value.shape != (*axes, last):
            raise ShapeError(
                f"expected {name} of shape ({letters}, {last}) = {(*axes, last)}, got {tuple(value.shape)}; "
                f"give a row for each region of each {'pair of images' if images[1:] else 'image'}"
            )
