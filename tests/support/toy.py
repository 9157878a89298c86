"""A toy model with two modalities, its batches, sites and perturbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import L2, Adapter, Ascent, Ball, EmbeddingPerturber, Site

STEP_SIZES = {"text": 0.3, "image": 0.5}
UNLIMITED = L2()


class ToyModel(nn.Module):
    """Words and regions to class scores, by attention over both; masks are true masks."""

    def __init__(
        self, *, vocabulary: int = 11, features: int = 5, width: int = 8, classes: int = 4, dropout: float = 0.0
    ):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.project = nn.Linear(features, width)
        self.mix = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(width, 1)
        self.head = nn.Linear(width, classes)

    def forward(
        self, ids: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        tokens = torch.cat([self.words(ids), self.project(regions)], 1)
        hidden = self.dropout(torch.tanh(self.mix(tokens)))
        scores = self.query(hidden).squeeze(-1)
        scores = scores.masked_fill(~torch.cat([mask, region_mask], 1), -torch.inf)
        logits = self.head((scores.softmax(1).unsqueeze(-1) * hidden).sum(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def toy_sites() -> dict[str, Site]:
    return {
        "text": Site("words", mask=lambda batch: batch["mask"]),
        "image": Site("project", at="input", mask=lambda batch: batch["region_mask"]),
    }


def toy_batch(
    rows: int = 3, length: int = 5, regions: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Row i has `length - i % 3` words and `regions - i % 2` regions."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(rows)
    return {
        "ids": torch.randint(11, (rows, length), generator=generator),
        "regions": torch.randn(rows, regions, 5, generator=generator, dtype=torch.float64).to(dtype),
        "mask": torch.arange(length) < (length - index % 3).clamp(min=1)[:, None],
        "region_mask": torch.arange(regions) < (regions - index % 2).clamp(min=1)[:, None],
        "labels": torch.randint(4, (rows,), generator=generator),
    }


def toy(*, dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    return Adapter(ToyModel(dropout=dropout).to(dtype), toy_sites())


def perturber(
    *modalities: str, ball: Ball = UNLIMITED, step_size: float | None = None, **options: Any
) -> EmbeddingPerturber:
    """Of both modalities, or of those named."""
    return EmbeddingPerturber(
        **{
            name: Ascent(ball, step_size=STEP_SIZES.get(name, 0.3) if step_size is None else step_size, **options)
            for name in modalities or STEP_SIZES
        }
    )


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in adapter.model.named_parameters() if p.grad is not None}


def adapt_toy(model: nn.Module) -> Adapter:
    """What a registered adapter is: a function from the model."""
    return Adapter(model, toy_sites())
