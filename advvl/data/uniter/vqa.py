"""Batches for UNITER of visual questions of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.uniter.batching import collate
from advvl.data.uniter.regions import regions_of
from advvl.data.uniter.word_pieces import TextMeta, encoded
from advvl.data.vqa import VQAExample, check_table, check_widths, targets
from advvl.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class UniterCollate:
    """The `collate_fn` of a `DataLoader` over `VQAExample`s, for `advvl.tasks.uniter.vqa.UniterForVQA`.

    Arguments:
        tokenizer: of tokenizers or transformers, with BERT's special tokens or RoBERTa's.
        answers: numbers them, such as `frequent_answers(examples)`.
        length: of a text, [CLS] and [SEP] included; a longer one is cut.
        unknown: what to do with a right answer that the table lacks.

    Raises:
        ConfigurationError: a length that leaves no word; answers that are no table.
    """

    tokenizer: Any
    answers: AnswerTable
    length: int = 60
    unknown: Unknown = "refuse"

    def __post_init__(self) -> None:
        if self.length < 3:
            raise ConfigurationError(f"expected a length of 3 tokens or more, got {self.length!r}")
        check_table(self.answers)
        object.__setattr__(self, "_meta", TextMeta.of(self.tokenizer))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, for the model's configuration."""
        return int(1 + max(self.tokenizer.get_vocab().values()))

    def __call__(self, examples: Sequence[VQAExample]) -> dict[str, Any]:
        """Return a batch of UNITER's fields, and `targets` (B, A) where answers are known.

        Raises:
            DataError: answers to some of them alone; one that the table lacks; features of different widths.
        """
        texts = [self._ids(example.text) for example in examples]
        check_widths(examples)
        images = [regions_of(example.features, example.boxes) for example in examples]
        return {**collate(texts, images), **targets(examples, self.answers, self.unknown)}

    def _ids(self, text: str) -> list[int]:
        meta: TextMeta = self._meta  # type: ignore[attr-defined]
        return [meta.cls, *encoded(self.tokenizer, text)[: self.length - 2], meta.sep]
