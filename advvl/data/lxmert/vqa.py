"""Batches for LXMERT of visual questions of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.lxmert.sources import Sentences
from advvl.data.vqa import VQAExample, check_table, padded_features, targets


@dataclass(frozen=True, eq=False)
class LxmertCollate:
    """The `collate_fn` of a `DataLoader` over `VQAExample`s, for `advvl.tasks.lxmert.vqa.LxmertForVQA`.

    Arguments:
        sentences: the tokeniser and the length of a text.
        answers: numbers them, such as `frequent_answers(examples)`.
        unknown: what to do with a right answer that the table lacks.

    Raises:
        ConfigurationError: answers that are no table.
    """

    sentences: Sentences
    answers: AnswerTable
    unknown: Unknown = "refuse"

    def __post_init__(self) -> None:
        check_table(self.answers)

    def __call__(self, examples: Sequence[VQAExample]) -> dict[str, Any]:
        """Return a batch of LXMERT's fields, and `targets` (B, A) where answers are known.

        Raises:
            DataError: answers to some of them alone; one that the table lacks; features of different widths.
        """
        counts = torch.tensor([len(example.boxes) for example in examples])
        return {
            **self.sentences.fields([example.text for example in examples]),
            "visual_feats": padded_features(examples),
            "visual_pos": pad_sequence([example.boxes for example in examples], batch_first=True),
            "visual_attention_mask": (torch.arange(int(counts.max())) < counts[:, None]).long(),
            **targets(examples, self.answers, self.unknown),
        }
