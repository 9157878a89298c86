"""Masked language modelling: predict the masked words from the others and the picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from advvl.errors import DataError, ShapeError
from advvl.models.uniter.model import UniterConfig, UniterOutput


class WordPredictions(nn.Module):
    """Scores of the vocabulary, by the word embeddings themselves."""

    def __init__(self, config: UniterConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)  # type: ignore[no-untyped-call]
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = words.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """From `(N, H)` to `(N, V)`."""
        scores: Tensor = self.decoder(self.transform(hidden))
        return scores + self.bias


class MaskedWordHead(nn.Module):
    """The head that published checkpoints call `cls`."""

    def __init__(self, config: UniterConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.predictions = WordPredictions(config, words)

    def forward(self, hidden: Tensor, labels: Tensor) -> UniterOutput:
        """Cross-entropy at the masked words.

        Arguments:
            hidden: `(B, S, H)`, each row's tokens first.
            labels: `(B, L)`, the word that was masked, -1 elsewhere.

        Raises:
            ShapeError: labels of another shape.
            DataError: no masked word.
        """
        if labels.ndim != 2 or labels.shape[0] != hidden.shape[0] or labels.shape[1] > hidden.shape[1]:
            raise ShapeError(
                f"expected txt_labels of shape (B, L) for hidden states {tuple(hidden.shape)}, got {tuple(labels.shape)}"
            )
        masked = labels != -1
        logits: Tensor = self.predictions(hidden[:, : labels.shape[1]][masked])
        if not logits.shape[0]:
            raise DataError("expected a masked word in the batch (a label other than -1), got none; mask one per text")
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), labels[masked], reduction="none")
        return UniterOutput(loss=losses.mean(), losses=losses, logits=logits)
