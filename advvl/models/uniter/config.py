"""The sizes of a UNITER: BERT's, and those of the image side."""

from __future__ import annotations

import os
from typing import Any

from transformers import BertConfig

from advvl.checks import at_least, not_negative, path_of
from advvl.errors import ConfigurationError
from advvl.files import parse_json

BOX_DIM = 7  # x1, y1, x2, y2, width, height (all over the image's), area


class UniterConfig(BertConfig):  # type: ignore[no-untyped-call]
    """BERT's configuration and the image side's sizes; BERT's own defaults are UNITER-base's.

    Arguments:
        img_dim: width F of a region's feature.
        img_label_dim: number C of region classes, the background's included.
        itm_ot_lambda: weight of the optimal-transport term in image-text matching; 0: no such term.
        attn_implementation: "sdpa" (default) or "eager".

    Raises:
        ConfigurationError: a size that makes no model.
    """

    model_type = "uniter"

    vocab_size: int = 28996
    img_dim: int = 2048
    img_label_dim: int = 1601
    itm_ot_lambda: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("attn_implementation", "sdpa")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        sizes = ("vocab_size", "img_dim", "img_label_dim", "hidden_size", "num_hidden_layers", "num_attention_heads")
        at_least(1, self, *sizes)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"expected hidden_size to be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        not_negative(self, "itm_ot_lambda")
        if self._attn_implementation not in ("eager", "sdpa"):
            raise ConfigurationError(
                f"expected attn_implementation to be 'eager' or 'sdpa', got {self._attn_implementation!r}"
            )

    @classmethod
    def base(cls, **overrides: Any) -> UniterConfig:
        """UNITER-base: 12 layers of width 768."""
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides: Any) -> UniterConfig:
        """UNITER-large: 24 layers of width 1024."""
        sizes = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
        return cls(**sizes | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> UniterConfig:
        """A few thousand parameters, for tests and trials: 2 layers of width 48, 40 features, 23 region classes."""
        sizes = {
            "vocab_size": 97,
            "img_dim": 40,
            "img_label_dim": 23,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 32,
        }
        return cls(**sizes | overrides)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str], **overrides: Any) -> UniterConfig:
        """Read the official JSON (BERT's sizes are enough), with keywords overriding its values.

        Raises:
            ConfigurationError: the file is missing, or is not a JSON object.
        """
        json_file = path_of(json_file)
        try:
            values = parse_json(json_file)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"expected a UNITER configuration in JSON at {str(json_file)!r}, got {error}"
            ) from error
        if not isinstance(values, dict):
            raise ConfigurationError(f"expected a JSON object in {str(json_file)!r}, got a {type(values).__name__}")
        return cls(**values | overrides)
