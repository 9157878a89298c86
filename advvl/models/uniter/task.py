"""A UNITER with a task's head, as the adapter and the checkpoints see it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from advvl.errors import ConfigurationError
from advvl.models.uniter.config import UniterConfig
from advvl.models.uniter.model import UniterModel

TYPES: Final = "uniter.embeddings.token_type_embeddings.weight"
WORDS: Final = frozenset(
    {"uniter.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"}
)
"""Official names of the tensors with a row per type and per word."""


class UniterTask(nn.Module):
    """The base of a task's model: the encoder, as `uniter`, and a configuration with the types and words of the task.

    Arguments (attributes of a class):
        fields: the names that `forward` takes; the adapter passes on no others.
        type_rows: for each type of the model, the one of pre-training that it starts from.
        new_words: words after those of pre-training; their embeddings start at random.

    Arguments:
        config: as of pre-training. `self.config` has the task's types and new words.

    Raises:
        ConfigurationError: more types than the task has.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields
    type_rows: ClassVar[tuple[int, ...]] = (0, 1)
    new_words: ClassVar[int] = 0

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.config = self._extended(config)
        self.uniter = UniterModel(self.config)
        if self.new_words:
            self.uniter.embeddings.word_embeddings.padding_idx = (
                None  # as in the published table; padding gets no gradient
            )

    def examples(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The example of each row of the encoder, `(N,)`, where one has several; None: a row is an example."""
        del batch
        return None

    def grown(self, name: str, value: Tensor) -> Tensor:
        """A tensor of a pre-training checkpoint, by its official name, with this model's types and new words.

        A type is copied from the one that it starts from; new words are this model's own. Others stay as they are.
        """
        if name not in (TYPES, *WORDS) or not value.ndim:
            return value
        if name == TYPES:
            known, all_of_them = max(self.type_rows) + 1, len(self.type_rows)
            return value[list(self.type_rows)] if known == len(value) < all_of_them else value
        known, own = self.config.vocab_size - self.new_words, self.state_dict().get(name)
        if own is None or own.shape[1:] != value.shape[1:] or not known <= len(value) < len(own):
            return value
        return torch.cat([value[:known], own[known:].to(value)])  # rows of the file above `known` are padding

    def derived(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a pre-training checkpoint lacks and that start from others of it, by official name."""
        del state
        return {}

    def _extended(self, config: UniterConfig) -> UniterConfig:
        types = len(self.type_rows)
        if types == 2 and not self.new_words:
            return config
        if config.type_vocab_size > types:
            raise ConfigurationError(
                f"expected type_vocab_size of at most {types} for {type(self).__name__}, got {config.type_vocab_size}; "
                "give the sizes of pre-training"
            )
        config = copy.deepcopy(config)
        config.type_vocab_size = types
        config.vocab_size += self.new_words
        return config


def answer_head(config: UniterConfig, answers: int, activation: nn.Module) -> nn.Sequential:
    """The head of two layers that several tasks have, from `(B, H)` to `(B, answers)`."""
    width = config.hidden_size
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        activation,
        nn.LayerNorm(2 * width, eps=config.layer_norm_eps),
        nn.Linear(2 * width, answers),
    )


def freeze(*modules: nn.Module) -> None:
    """Freeze modules that no loss reaches: their parameters would keep DistributedDataParallel waiting."""
    for module in modules:
        module.requires_grad_(False)
