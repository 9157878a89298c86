"""UNITER (Chen et al., ECCV 2020) on transformers' BERT layers."""

from __future__ import annotations

from advvl.models.layout import gather_index as gather_index
