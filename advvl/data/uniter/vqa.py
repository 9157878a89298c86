"""Batches for UNITER of visual questions of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.uniter.batching import Images, join, pad_texts
from advvl.data.vqa import VQAExample, check_table, padded_features, targets
from advvl.data.wordpiece import CLS, SEP
from advvl.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class UniterCollate:
    """The `collate_fn` of a `DataLoader` over `VQAExample`s, for `advvl.tasks.uniter.vqa.UniterForVQA`.

    Arguments:
        tokenizer: WordPiece with BERT's special tokens, as `advvl.data.wordpiece` makes or reads it.
        answers: numbers them, such as `frequent_answers(examples)`.
        length: of a text, [CLS] and [SEP] included; a longer one is cut.
        unknown: what to do with a right answer that the table lacks.

    Raises:
        ConfigurationError: a length that leaves no word; answers that are no table.
    """

    tokenizer: Tokenizer
    answers: AnswerTable
    length: int = 60
    unknown: Unknown = "refuse"

    def __post_init__(self) -> None:
        if self.length < 3:
            raise ConfigurationError(f"expected a length of 3 tokens or more, got {self.length!r}")
        check_table(self.answers)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, for the model's configuration."""
        return int(self.tokenizer.get_vocab_size())

    def __call__(self, examples: Sequence[VQAExample]) -> dict[str, Any]:
        """Return a batch of UNITER's fields, and `targets` (B, A) where answers are known.

        Raises:
            DataError: answers to some of them alone; one that the table lacks; features of different widths.
        """
        texts = pad_texts([self._ids(example.text) for example in examples])
        images = Images(
            features=padded_features(examples),
            boxes=pad_sequence([_seven(example.boxes) for example in examples], batch_first=True),
            lengths=torch.tensor([len(example.boxes) for example in examples]),
            labels=torch.zeros(len(examples), 0, 0),  # of regions, which no question asks for
        )
        rows = torch.arange(len(examples))
        return {**join(texts, rows, images, rows), **targets(examples, self.answers, self.unknown)}

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer.encode(text, add_special_tokens=False).ids
        opening, closing = (self.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        return [CLS if opening is None else opening, *encoded[: self.length - 2], SEP if closing is None else closing]


def _seven(boxes: Tensor) -> Tensor:
    """UNITER's seven numbers of each box: corners, width, height and area, over the image's."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([boxes, sizes, sizes.prod(1, keepdim=True)], 1)
