"""NLVR2: is a sentence true of two pictures?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from advvl.checks import is_choice
from advvl.errors import ConfigurationError, ShapeError
from advvl.models.uniter.model import HIDDEN_SCORE, UniterConfig, UniterModel, UniterOutput, given, initialise
from advvl.models.uniter.task import UniterTask, freeze
from advvl.tasks.losses import class_losses

Variant = Literal["paired-attn", "paired", "triplet"]


class UniterForNLVR2(UniterTask):
    """UNITER that judges a sentence about two images (published code, `model/nlvr2.py`).

    * "paired-attn": two rows of the encoder for each sentence, with its left image and with its right one; the rows attend
      to each other, and each is pooled by attention.
    * "paired": the same rows; both pooled first tokens, concatenated. * "triplet": one row, the sentence with the
    regions of the left image and then of the right one; its pooled first token.

    Regions of left images have type 1, those of right ones type 2. In the paired variants the two copies of a sentence
    have separate perturbations, as published.

    Arguments:
        config: of pre-training; a third type is added.
        variant: "paired-attn" is that of all released configurations.

    Raises:
        ConfigurationError: another variant.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields - {"img_masks"} | {"targets"}
    type_rows: ClassVar[tuple[int, ...]] = (0, 1, 1)

    def __init__(self, config: UniterConfig, *, variant: Variant = "paired-attn") -> None:
        super().__init__(config)
        if not is_choice(variant, get_args(Variant)):
            raise ConfigurationError(f"expected variant to be one of {', '.join(get_args(Variant))}, got {variant!r}")
        self.variant = variant
        width = config.hidden_size
        if variant == "paired-attn":
            heads, dropped = config.num_attention_heads, config.attention_probs_dropout_prob
            self.attn1 = nn.MultiheadAttention(width, heads, dropped, batch_first=True)
            self.attn2 = nn.MultiheadAttention(width, heads, dropped, batch_first=True)
            self.fc = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(config.hidden_dropout_prob))
            self.attn_pool = AttentionPool(config)
            freeze(self.uniter.pooler)  # the first token's pooled state has no part in this head
        self.nlvr2_output = nn.Linear(width if variant == "triplet" else 2 * width, 2)
        for head in self.children():
            if head is not self.uniter:
                initialise(head, config)
        freeze(self.uniter.img_embeddings.mask_embedding)

    @property
    def images(self) -> int:
        """Rows of the encoder for each sentence."""
        return 1 if self.variant == "triplet" else 2

    def examples(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The sentence of each row; None where a row is a sentence."""
        words: Tensor = batch["input_ids"]
        return None if self.images == 1 else torch.arange(len(words), device=words.device) // self.images

    def forward(self, *, targets: Tensor | None = None, **fields: Tensor) -> UniterOutput:
        """Scores of false and true `(n, 2)` of n sentences, and with `targets` `(n,)`, 1 for true, each one's loss `(n,)`.

        Other fields are those of `UniterModel.forward`, of 2n rows in the paired variants.

        Raises:
            ShapeError: an odd number of rows in a paired variant; targets that are not one for each sentence.
        """
        words = given("input_ids", fields.get("input_ids"))
        if len(words) % self.images:
            raise ShapeError(
                f"expected two rows for each sentence, its left and its right image's, got {len(words)} rows; give both, "
                'or variant="triplet"'
            )
        encoded = self.uniter(**fields)
        if self.variant == "paired-attn":
            features = self._attended(encoded.last_hidden_state, fields["attn_masks"] == 0)
        else:
            features = encoded.pooler_output.reshape(len(words) // self.images, -1)
        logits: Tensor = self.nlvr2_output(features)
        losses = None if targets is None else class_losses(logits, targets)
        return UniterOutput(loss=losses, losses=losses, logits=logits)

    def _attended(self, hidden: Tensor, padding: Tensor) -> Tensor:
        """From hidden states `(2n, S, H)` to both images' pooled ones, side by side, `(n, 2H)`."""
        left, right = hidden[0::2], hidden[1::2]
        left_padding, right_padding = padding[0::2], padding[1::2]
        from_right, _ = self.attn1(left, right, right, key_padding_mask=right_padding, need_weights=False)
        from_left, _ = self.attn2(right, left, left, key_padding_mask=left_padding, need_weights=False)
        left, right = self.fc(torch.cat([from_right, left], -1)), self.fc(torch.cat([from_left, right], -1))
        return torch.cat([self.attn_pool(left, left_padding), self.attn_pool(right, right_padding)], -1)


class AttentionPool(nn.Module):
    """The mean of a row's states, weighted by a softmax of their scores."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(config.hidden_size, 1), nn.ReLU())
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, padding: Tensor) -> Tensor:
        """From `(n, S, H)` and the mask of padding `(n, S)` to `(n, H)`."""
        scores = self.fc(hidden).squeeze(-1) + HIDDEN_SCORE * padding.to(hidden.dtype)
        weights: Tensor = self.dropout(scores.softmax(-1))
        return (weights[:, None] @ hidden).squeeze(1)
