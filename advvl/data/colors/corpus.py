"""Colors in Context for UNITER: choosing the described one of three colours, and utterances for pre-training.

A region is a colour with red, green and blue in [0, 1] as its feature, so a perturbed region within that box is a
colour again. Regions are in the listener's order, in three boxes side by side, which reveals nothing about the target.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from tokenizers import Tokenizer

from advvl.data.colors.rounds import Part, Round, Rounds, read_rounds
from advvl.data.uniter.batching import Images, pad_texts
from advvl.data.uniter.sources import CaptionSource, LabelledSource
from advvl.data.wordpiece import build_tokenizer, replacement_range, token_ids

REGIONS: Final = 3
"""Regions of a round."""

CHANNELS: Final = 3
"""Numbers of a region's feature."""

MOST_TOKENS: Final = 40
"""Of an utterance, including [CLS] and [SEP]; 1 round in 400 is longer and is cut."""

PRETRAINING_TASKS: Final = ("mlm", "mlm", "itm", "mrfr")

_LEAST: Final = 2  # occurrences in training games that a word needs to get its own token


@dataclass(frozen=True, eq=False)
class ColorsCorpus:
    """Rounds for training, validation and test, utterances of training games for pre-training, and what they share.

    Arguments:
        train, validation, test: batches have UNITER's fields and `targets` (B,), the index of the described colour.
        tokenizer: of the words that occur at least twice in training games.
        rounds: those of each part, in the order of its source.
        corpus: everything that was read, and the list of skipped rows.
    """

    train: LabelledSource
    validation: LabelledSource
    test: LabelledSource
    pretrain: CaptionSource
    tokenizer: Tokenizer
    rounds: dict[Part, tuple[Round, ...]]
    corpus: Rounds

    feature_dim: ClassVar[int] = CHANNELS
    label_dim: ClassVar[int] = 2
    """Of regions; colours have no classes here."""
    max_text_length: ClassVar[int] = MOST_TOKENS

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return int(self.tokenizer.get_vocab_size())


def colors_corpus(path: str | os.PathLike[str]) -> ColorsCorpus:
    """Read the corpus from the folder or archive of its CSV files; it is split by games, never within a game.

    Raises:
        DataError: the files are missing, or no round can be made of them.
    """
    corpus = read_rounds(path)
    rounds: dict[Part, tuple[Round, ...]] = {
        "train": corpus.part("train"),
        "validation": corpus.part("validation"),
        "test": corpus.part("test"),
    }
    tokenizer = build_tokenizer((one.utterance for one in rounds["train"]), least=_LEAST)
    sources = {name: pairs_of(part, tokenizer) for name, part in rounds.items()}
    train = sources["train"]
    captions = CaptionSource(
        train.texts,
        train.images,
        train.image_rows,
        replacements=replacement_range(tokenizer),
        tasks=PRETRAINING_TASKS,
    )
    return ColorsCorpus(
        train, sources["validation"], sources["test"], captions, tokenizer=tokenizer, rounds=rounds, corpus=corpus
    )


def pairs_of(rounds: Sequence[Round], tokenizer: Tokenizer) -> LabelledSource:
    """Make a source of rounds: the utterance's tokens, the three colours as regions, and the index of the target."""
    count = len(rounds)
    ids = token_ids(tokenizer, (one.utterance for one in rounds))
    ids = [[*row[: MOST_TOKENS - 1], row[-1]] if len(row) > MOST_TOKENS else row for row in ids]
    edges = torch.arange(REGIONS + 1) / REGIONS
    left, right, low, high = edges[:-1], edges[1:], torch.zeros(REGIONS), torch.ones(REGIONS)
    boxes = torch.stack([left, low, right, high, right - left, high, right - left], 1)
    return LabelledSource(
        pad_texts(ids),
        Images(
            features=torch.tensor([one.colors for one in rounds]).reshape(count, REGIONS, CHANNELS),
            boxes=boxes.expand(count, -1, -1),
            lengths=torch.full((count,), REGIONS),
            labels=torch.zeros(count, REGIONS, 0),  # of regions: there are no classes
        ),
        torch.arange(count),
        labels={"targets": torch.tensor([one.target for one in rounds], dtype=torch.long)},
    )
