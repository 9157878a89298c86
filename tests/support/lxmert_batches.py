"""Tiny LXMERTs and random batches for them, with transformers' field names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LxmertConfig

ANSWERS = 5
TOKENS, REGIONS = (6, 4, 2), (4, 5, 1)  # real ones of each row; the longest text has not the most regions


def lxmert_config(**options: Any) -> LxmertConfig:
    values: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "l_layers": 1,
        "x_layers": 2,
        "r_layers": 1,
        "visual_feat_dim": 7,
        "num_qa_labels": ANSWERS,
        "num_object_labels": 4,
        "num_attr_labels": 3,
        "max_position_embeddings": 12,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return LxmertConfig(**values | options)


def lxmert_batch(*, images: int = 0, more_text: int = 0, more_regions: int = 0) -> dict[str, Tensor]:
    """Text (3, T) and regions (3, R, …), or with `images` (3, images, R, …); padding, which `more_…` widens, is junk."""
    rows, generator = len(TOKENS), torch.Generator().manual_seed(3)
    words, boxes = torch.tensor(TOKENS), torch.tensor(REGIONS)
    axes = (rows, images) if images else (rows,)
    ids = torch.randint(1, 31, (rows, max(TOKENS)), generator=generator)
    feats = torch.randn(*axes, max(REGIONS), 7, generator=generator, dtype=torch.float64)
    pos = torch.rand(*axes, max(REGIONS), 4, generator=generator, dtype=torch.float64)
    ids = torch.nn.functional.pad(ids, (0, more_text), value=9)
    feats, pos = (torch.nn.functional.pad(x, (0, 0, 0, more_regions), value=0.5) for x in (feats, pos))
    regions = torch.arange(feats.shape[-2]) < boxes[:, None]
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < words[:, None]).long(),
        "token_type_ids": torch.zeros_like(ids),
        "visual_feats": feats,
        "visual_pos": pos,
        "visual_attention_mask": (regions[:, None].expand(*axes, -1) if images else regions).long(),
    }


def vqa_batch(**options: Any) -> dict[str, Tensor]:
    targets = torch.linspace(0, 1, len(TOKENS) * ANSWERS, dtype=torch.float64).view(len(TOKENS), ANSWERS)
    return lxmert_batch(**options) | {"targets": targets}


def nlvr2_batch(**options: Any) -> dict[str, Tensor]:
    return lxmert_batch(images=2, **options) | {"targets": torch.tensor([1, 0, 1])}


def pretraining_batch() -> dict[str, Tensor]:
    """One masked word a text, and an object, an attribute, a feature, a match and an answer to tell."""
    batch = lxmert_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = batch["input_ids"][:, 1]
    regions = batch["visual_feats"].shape[:2]
    confidence = torch.ones(regions, dtype=torch.float64)
    return batch | {
        "labels": labels,
        "matched_label": torch.tensor([1, 0, 1]),
        "ans": torch.tensor([0, 3, 1]),
        "obj_labels": {  # type: ignore[dict-item]
            "obj": (torch.ones(regions, dtype=torch.long), confidence),
            "attr": (torch.ones(regions, dtype=torch.long), confidence),
            "feat": (batch["visual_feats"], confidence),
        },
    }
