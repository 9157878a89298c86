"""UNITER (Chen et al., ECCV 2020) on transformers' BERT layers, with the names of its published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertPooler
from transformers.utils.generic import ModelOutput

from advvl.errors import DataError, ShapeError
from advvl.models.uniter.config import BOX_DIM
from advvl.models.uniter.config import UniterConfig as UniterConfig
from advvl.models.uniter.layout import gather_index as gather_index
from advvl.models.uniter.layout import region_mask as region_mask
from advvl.models.uniter.layout import text_mask as text_mask
from advvl.runtime.reading import readable

HIDDEN_SCORE = -10000.0  # added to the attention scores of padding, as published


@dataclass
class UniterOutput(ModelOutput):
    """The outputs of a UNITER; a field that a model or task does not have is None.

    Arguments:
        loss: one per row `(B,)`, or the scalar that the published training uses.
        logits: for regularisers to compare, `(B, A)`, or `(N, V)` at N masked positions.
        losses: the unreduced loss.
        distances: optimal-transport distance between each row's tokens and regions, `(B,)`.
        last_hidden_state: `(B, S, H)`.
        pooler_output: `(B, H)`, of the first token.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: Tensor | None = None
    distances: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None


class ImageEmbeddings(nn.Module):
    """A region's embedding: of its feature, its box and its type."""

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.img_linear = nn.Linear(config.img_dim, width)
        self.img_layer_norm = nn.LayerNorm(width, eps=eps)
        self.pos_layer_norm = nn.LayerNorm(width, eps=eps)
        self.pos_linear = nn.Linear(BOX_DIM, width)
        self.mask_embedding = nn.Embedding(2, config.img_dim, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: Tensor, boxes: Tensor, types: Tensor, masked: Tensor | None) -> Tensor:
        """From `(B, R, F)`, `(B, R, 7)`, type embeddings `(B, R, H)` and the mask `(B, R)` to `(B, R, H)`."""
        dtype = self.LayerNorm.weight.dtype
        features, boxes = features.to(dtype), boxes.to(dtype)
        if masked is not None:
            features = features + masked[..., None].to(dtype) * self.mask_embedding.weight[1]
        image = self.img_layer_norm(self.img_linear(features)) + self.pos_layer_norm(self.pos_linear(boxes))
        embedded: Tensor = self.dropout(self.LayerNorm(image + types))
        return embedded


class UniterModel(nn.Module):
    """The encoder of words and regions; parameters are named as in the published checkpoints, less their `uniter.`."""

    fields: ClassVar[frozenset[str]] = frozenset(
        {
            "input_ids",
            "position_ids",
            "txt_type_ids",
            "txt_lens",
            "img_feat",
            "img_pos_feat",
            "img_type_ids",
            "img_masks",
            "num_bbs",
            "attn_masks",
            "gather_index",
        }
    )

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)  # type: ignore[no-untyped-call]
        self.img_embeddings = ImageEmbeddings(config)
        self.encoder = BertEncoder(config)  # type: ignore[no-untyped-call]
        self.pooler = BertPooler(config)  # type: ignore[no-untyped-call]
        initialise(self, config)

    def forward(
        self,
        *,
        input_ids: Tensor | None = None,
        img_feat: Tensor | None = None,
        img_pos_feat: Tensor | None = None,
        attn_masks: Tensor | None = None,
        gather_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        img_masks: Tensor | None = None,
        txt_type_ids: Tensor | None = None,
        img_type_ids: Tensor | None = None,
        txt_lens: Tensor | None = None,
        num_bbs: Tensor | None = None,
    ) -> UniterOutput:
        """Encode a batch.

        Arguments:
            input_ids: `(B, L)`, zero padded.
            img_feat, img_pos_feat: features `(B, R, F)` and boxes `(B, R, 7)`, zero padded.
            attn_masks, gather_index: the mask of real positions in the sequences, and the embedding at each, `(B, S)`.
            position_ids: `(1, L)` or `(B, L)`; None: from 0.
            img_masks: the masked regions, `(B, R)`, to which a mask embedding is added; None: none.
            txt_type_ids, img_type_ids: `(B, L)` and `(B, R)`; None: 0 and 1.
            txt_lens, num_bbs: in our batches for code that needs lengths; the encoder does not.

        Raises:
            DataError: a field that is missing, or of integers instead of floats or the reverse; on a CPU, a word, type
                or position that the model or the batch does not have.
            ShapeError: a field of another shape.
        """
        del txt_lens, num_bbs
        input_ids, img_feat = given("input_ids", input_ids), given("img_feat", img_feat)
        img_pos_feat = given("img_pos_feat", img_pos_feat)
        attn_masks, gather_index = given("attn_masks", attn_masks), given("gather_index", gather_index)
        self._check(input_ids, img_feat, img_pos_feat, attn_masks, gather_index, img_masks)
        words, types = self.config.vocab_size, self.config.type_vocab_size
        check_range("input_ids", input_ids, words, "vocab_size")
        check_range("txt_type_ids", txt_type_ids, types, "type_vocab_size")
        check_range("img_type_ids", img_type_ids, types, "type_vocab_size")
        check_range("gather_index", gather_index, input_ids.shape[1] + img_feat.shape[1], "L + R")
        text = self.embeddings(input_ids=input_ids, token_type_ids=txt_type_ids, position_ids=position_ids)
        if img_type_ids is None:
            img_type_ids = torch.ones(img_feat.shape[:2], dtype=torch.long, device=img_feat.device)
        types = self.embeddings.token_type_embeddings(img_type_ids)
        joined = torch.cat([text, self.img_embeddings(img_feat, img_pos_feat, types, img_masks)], 1)
        sequence = joined.gather(1, gather_index[..., None].expand(-1, -1, joined.shape[-1]))
        hide = (1.0 - attn_masks[:, None, None].to(joined.dtype)) * HIDDEN_SCORE
        hidden = self.encoder(sequence, attention_mask=hide).last_hidden_state
        return UniterOutput(last_hidden_state=hidden, pooler_output=self.pooler(hidden))

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward instead of keeping its activations."""
        for layer in self.encoder.layer:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    def _check(
        self,
        input_ids: Tensor,
        img_feat: Tensor,
        img_pos_feat: Tensor,
        attn_masks: Tensor,
        gather_index: Tensor,
        img_masks: Tensor | None,
    ) -> None:
        for name, value in (("img_feat", img_feat), ("img_pos_feat", img_pos_feat)):
            if not value.is_floating_point():
                raise DataError(f"expected {name} of floating-point numbers, got {value.dtype}")
        for name, value in (("input_ids", input_ids), ("gather_index", gather_index)):
            if value.is_floating_point() or value.dtype == torch.bool:
                raise DataError(f"expected {name} of whole numbers, got {value.dtype}")
        if input_ids.ndim != 2:
            raise ShapeError(f"expected input_ids of shape (B, L), got {tuple(input_ids.shape)}")
        rows, longest = input_ids.shape
        if longest > self.config.max_position_embeddings:
            raise ShapeError(
                f"expected texts of at most max_position_embeddings = {self.config.max_position_embeddings} tokens, "
                f"got {longest}; cut them"
            )
        regions = img_feat.shape[1] if img_feat.ndim == 3 else 0
        places = attn_masks.shape[1] if attn_masks.ndim == 2 else 0
        _shape("img_feat", img_feat, (rows, regions, self.config.img_dim), "B, R, img_dim")
        _shape("img_pos_feat", img_pos_feat, (rows, regions, BOX_DIM), "B, R, 7")
        _shape("attn_masks", attn_masks, (rows, places), "B, S")
        _shape("gather_index", gather_index, (rows, places), "B, S")
        if img_masks is not None:
            _shape("img_masks", img_masks, (rows, regions), "B, R")


def initialise(model: nn.Module, config: UniterConfig) -> None:
    """Draw weights as published: normal for every matrix, padding rows among them; no bias; unit normalisations."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)


def given(name: str, value: Tensor | None) -> Tensor:
    """Return a field that the batch must hold.

    Raises:
        DataError: it does not.
    """
    if value is None:
        raise DataError(
            f"expected the field {name!r} in the batch, got none; see advvl.models.uniter.model for the fields"
        )
    return value


def check_range(name: str, value: Tensor | None, size: int, of: str) -> None:
    """Raise DataError unless whole numbers are in 0 … size − 1, as far as that is known without waiting for a device."""
    if value is None or not value.numel() or not readable(value):
        return
    least, most = int(value.min()), int(value.max())
    if least < 0 or most >= size:
        raise DataError(
            f"expected {name} in 0..{size - 1}, by {of} = {size}, got {least if least < 0 else most}; was the batch made "
            "for another model or task?"
        )


def _shape(name: str, value: Tensor, wanted: tuple[int, ...], letters: str) -> None:
    if value.shape != wanted:
        raise ShapeError(f"expected {name} of shape ({letters}) = {wanted}, got {tuple(value.shape)}")
