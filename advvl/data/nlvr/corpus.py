"""NLVR for UNITER: a region is an object, the three boxes of a picture are one sequence of regions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import path_of
from advvl.data.nlvr.permutations import permutations
from advvl.data.nlvr.relations import RELATIONS, relations
from advvl.data.nlvr.statements import COLORS, SHAPES, SIDE, Item, Statement, read_statements
from advvl.data.uniter.batching import Images, pad_texts
from advvl.data.uniter.corruption import Task
from advvl.data.uniter.sources import CaptionSource, LabelledSource
from advvl.data.wordpiece import build_tokenizer, replacement_range, token_ids
from advvl.errors import DataError

Part = Literal["train", "validation", "test"]

BOXES: Final = 3

FEATURES: Final = len(SHAPES) + len(COLORS) + BOXES + 3
"""Numbers of a region: shape, colour and box as one of three each, and place and size over the side of its box."""

PRETRAINING_TASKS: Final[tuple[Task, ...]] = ("mlm", "mlm", "itm", "mrfr")


def statement_source(statements: Sequence[Statement], tokenizer: Tokenizer, *, related: bool = False) -> LabelledSource:
    """Make UNITER's batches of statements; with `targets` (B,), 1 for a true one, where labels are known.

    A region's box lies in the picture of three boxes side by side.

    Arguments:
        related: features also say how an object stands to the others; see `advvl.data.nlvr.relations`.

    Raises:
        DataError: no statement, or some with a label and some without.
    """
    known = [statement.label is not None for statement in statements]
    if not statements or any(known) != all(known):
        raise DataError(f"expected statements that all have a label or all none, got {sum(known)} of {len(known)}")
    items = [[(place, item) for place, box in enumerate(one.boxes) for item in box] for one in statements]
    labels = {"targets": torch.tensor([int(bool(one.label)) for one in statements])} if all(known) else {}
    return LabelledSource(
        pad_texts(token_ids(tokenizer, (one.sentence for one in statements))),
        Images(
            features=pad_sequence([_features(one, related=related) for one in statements], batch_first=True),
            boxes=pad_sequence([torch.tensor([_box(*one) for one in row]) for row in items], batch_first=True),
            lengths=torch.tensor([len(row) for row in items]),
            labels=torch.zeros(len(items), 0, 0),  # of regions: there are no classes
        ),
        torch.arange(len(statements)),
        labels=labels,
    )


def _features(statement: Statement, *, related: bool) -> Tensor:
    plain = [[_feature(place, item) for item in box] for place, box in enumerate(statement.boxes)]
    if related:
        more = relations(statement.boxes)
        plain = [[one + rest for one, rest in zip(*box, strict=True)] for box in zip(plain, more, strict=True)]
    return torch.tensor([one for box in plain for one in box])


def _feature(place: int, item: Item) -> list[float]:
    kinds = [float(item.shape == shape) for shape in SHAPES] + [float(item.color == color) for color in COLORS]
    return [*kinds, *(float(place == box) for box in range(BOXES)), item.x / SIDE, item.y / SIDE, item.size / SIDE]


def _box(place: int, item: Item) -> list[float]:
    left, top = (place + item.x / SIDE) / BOXES, item.y / SIDE
    width, height = item.size / SIDE / BOXES, item.size / SIDE
    return [left, top, left + width, top + height, width, height, width * height]


@dataclass(frozen=True, eq=False)
class NlvrCorpus:
    """Statements for training, validation and test, true ones for pre-training, and what they share.

    Arguments:
        train, validation, test: batches have UNITER's fields and `targets` (B, 2), one-hot: false or true.
        pretrain: the true statements of `train` with their boxes.
        statements: those of each part, in the order of its source; of "train" with their permutations.
    """

    train: LabelledSource
    validation: LabelledSource
    test: LabelledSource
    pretrain: CaptionSource
    tokenizer: Tokenizer
    statements: dict[Part, tuple[Statement, ...]]

    feature_dim: ClassVar[int] = FEATURES + RELATIONS
    label_dim: ClassVar[int] = 2
    """Of regions; objects have no classes here."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return int(self.tokenizer.get_vocab_size())

    @property
    def max_text_length(self) -> int:
        """Tokens of the longest sentence, [CLS] and [SEP] included."""
        return max(int(part.texts.lengths.max()) for part in (self.train, self.validation, self.test))


def nlvr_corpus(folder: str | os.PathLike[str], *, copies: int, fold: str, seed: int) -> NlvrCorpus:
    """Make the corpus of a folder with `dev.json` and `test.json`.

    The statements of `dev.json` are learnt, but for a fold of them, which is the validation part; `test.json` is the test
    part. Examples that were shown together are in one fold.

    Arguments:
        copies: of each statement that is learnt: itself, and permutations of it that keep its truth.
        fold: of `dev.json`, "0" to "5".
        seed: of the permutations.

    Raises:
        DataError: a file that is missing or malformed; a part without a statement, or with one whose label is not known.
    """
    known, tested = (read_statements(path_of(folder) / name) for name in ("dev.json", "test.json"))
    train = permutations([one for one in known if one.fold != fold], copies, seed)
    statements: dict[Part, tuple[Statement, ...]] = {
        "train": tuple(train),
        "validation": tuple(one for one in known if one.fold == fold),
        "test": tuple(tested),
    }
    tokenizer = build_tokenizer(one.sentence for one in train)
    sources = {name: _judged(part, name, tokenizer) for name, part in statements.items()}
    true = statement_source([one for one in train if one.label], tokenizer, related=True)
    captions = CaptionSource(
        true.texts,
        true.images,
        true.image_rows,
        replacements=replacement_range(tokenizer),
        tasks=PRETRAINING_TASKS,
    )
    return NlvrCorpus(
        sources["train"], sources["validation"], sources["test"], captions, tokenizer=tokenizer, statements=statements
    )


def _judged(statements: Sequence[Statement], part: str, tokenizer: Tokenizer) -> LabelledSource:
    known = sum(one.label is not None for one in statements)
    if not statements or known < len(statements):
        raise DataError(
            f"expected one statement or more to make the {part} part, all with labels, got {known} of {len(statements)}"
        )
    source = statement_source(statements, tokenizer, related=True)
    return replace(source, labels={"targets": one_hot(source.labels["targets"], 2).float()})
