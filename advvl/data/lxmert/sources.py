"""The sources of batches for LXMERT's training: VQA's and GQA's questions, NLVR2's sentences about two images.

Both have `len()` and `batch(indices, generator)`; regions are read from their files batch by batch, and nothing is drawn.
A text is [CLS], words, [SEP], cut and padded to 20 tokens, of segment 0, as published.

Legend: B rows, T tokens, R regions, F features, A answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from advvl.checks import at_least, check_each, instance
from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.lxmert.questions import Statement, VisualQuestion
from advvl.data.lxmert.regions import RegionFile
from advvl.data.source import checked_rows
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError

TEXT_LENGTH: Final = 20
SPECIALS: Final = ("[PAD]", "[CLS]", "[SEP]")


@dataclass(frozen=True, eq=False)
class Sentences:
    """Texts as LXMERT takes them.

    Arguments:
        tokenizer: WordPiece with BERT's special tokens, such as bert-base-uncased's, or transformers'
            `BertTokenizerFast(…).backend_tokenizer`.
        length: T, [CLS] and [SEP] included.

    Raises:
        ConfigurationError: a tokenizer without BERT's special tokens, a length that leaves no word.
    """

    tokenizer: Tokenizer
    length: int = TEXT_LENGTH

    def __post_init__(self) -> None:
        instance(Tokenizer, self, "tokenizer")
        at_least(3, self, "length")
        self._specials  # noqa: B018  (raises)

    @cached_property
    def _specials(self) -> tuple[int, ...]:
        ids = [number for token in SPECIALS if (number := self.tokenizer.token_to_id(token)) is not None]
        if len(ids) < len(SPECIALS):
            raise ConfigurationError(
                f"expected a tokenizer that knows {', '.join(SPECIALS)}, got one that does not; give BERT's"
            )
        return tuple(ids)

    def fields(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `token_type_ids`, (B, T) each."""
        padding, opening, closing = self._specials
        ids = torch.full((len(texts), self.length), padding)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            # A tokenizer may be set to pad on its own.
            words = [word for word, real in zip(encoded.ids, encoded.attention_mask, strict=True) if real]
            tokens = [opening, *words[: self.length - 2], closing]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of one or several region files.

    Raises:
        DataError: no file, files of different numbers of features, an image that two files have.
    """

    files: Sequence[RegionFile]

    def __post_init__(self) -> None:
        check_each(self, ("files",), _are_files, "region files, as open_regions gives them, in a list")
        if len({file.feature_dim for file in self.files}) != 1:
            found = {str(file.path): file.feature_dim for file in self.files}
            raise DataError(
                f"expected one region file or more, all of as many features per region, got {found or 'none'}; "
                "take files of one extraction"
            )
        if len(self._file_of) < sum(map(len, self.files)):
            both = next(image for file in self.files for image in file if self._file_of[image] is not file)
            raise DataError(
                f"expected every image in one of {', '.join(str(file.path) for file in self.files)}, got {both!r} in several"
            )

    @cached_property
    def _file_of(self) -> Mapping[str, RegionFile]:
        return {image_id: file for file in self.files for image_id in file}

    @property
    def feature_dim(self) -> int:
        """F, the number of features of a region."""
        return self.files[0].feature_dim

    @cached_property
    def num_boxes(self) -> int:
        """R, the largest number of regions of an image."""
        return max(file.most_boxes for file in self.files)

    def check(self, image_ids: Iterable[str]) -> None:
        """Raise DataError for an image that no file has."""
        for image_id in image_ids:
            if image_id not in self._file_of:
                raise DataError(
                    f"expected the image {image_id!r} in {', '.join(str(file.path) for file in self.files)}, got none; open "
                    "its file too, without a limit, or leave out what is asked about it"
                )

    def fields(self, image_ids: Sequence[str]) -> dict[str, Tensor]:
        """Return `visual_feats` (B, R, F), `visual_pos` (B, R, 4), and a `visual_attention_mask` (B, R) if R varies."""
        feats = torch.zeros(len(image_ids), self.num_boxes, self.feature_dim)
        pos = torch.zeros(len(image_ids), self.num_boxes, 4)
        mask = torch.zeros(len(image_ids), self.num_boxes, dtype=torch.long)
        read = {image_id: self._file_of[image_id][image_id] for image_id in dict.fromkeys(image_ids)}
        for row, image_id in enumerate(image_ids):
            image = read[image_id]
            feats[row, : len(image)] = image.features
            pos[row, : len(image)] = image.positions()
            mask[row, : len(image)] = 1
        fields = {"visual_feats": feats, "visual_pos": pos}
        vary = any(file.num_boxes != self.num_boxes for file in self.files)
        return {**fields, "visual_attention_mask": mask} if vary else fields


def _are_files(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(file, RegionFile) for file in value)


@dataclass(frozen=True, eq=False)
class VisualQuestionSource:
    """VQA's or GQA's questions, for `advvl.tasks.lxmert.vqa.LxmertForVQA`.

    Arguments:
        unknown: what to do with a right answer that the table lacks; GQA's are left out.

    Raises:
        DataError: no question, a question about an image that no file has, an answer that the table lacks, or labels that
            only some questions have.
    """

    questions: Sequence[VisualQuestion]
    pictures: Pictures
    answers: AnswerTable
    sentences: Sentences
    unknown: Unknown = "refuse"

    def __post_init__(self) -> None:
        _check_labels([question.label is not None for question in self.questions])
        for question in self.questions:
            with within(f"question {question.question_id!r}"):
                self.pictures.check((question.image_id,))
                if self.unknown == "refuse":
                    self.answers.check(question.label or {})

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The questions at `indices`: text (B, 20), regions (B, R, …), and `targets` (B, A) where answers are known."""
        del generator
        chosen = [self.questions[row] for row in checked_rows(indices, len(self)).tolist()]
        labels = [question.label for question in chosen if question.label is not None]
        return {
            **self.sentences.fields([question.sentence for question in chosen]),
            **self.pictures.fields([question.image_id for question in chosen]),
            **({"targets": self.answers.targets(labels, unknown=self.unknown)} if labels else {}),
        }


@dataclass(frozen=True, eq=False)
class StatementSource:
    """NLVR2's sentences, for `advvl.tasks.lxmert.nlvr2.LxmertForNLVR2`.

    Raises:
        DataError: as `VisualQuestionSource`.
    """

    statements: Sequence[Statement]
    pictures: Pictures
    sentences: Sentences

    def __post_init__(self) -> None:
        _check_labels([statement.label is not None for statement in self.statements])
        for statement in self.statements:
            with within(f"sentence {statement.uid!r}"):
                self.pictures.check(statement.image_ids)

    def __len__(self) -> int:
        return len(self.statements)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The sentences at `indices`: text (B, 20), regions (B, 2, R, …), and `targets` (B,) long where they are known."""
        del generator
        chosen = [self.statements[row] for row in checked_rows(indices, len(self)).tolist()]
        images = self.pictures.fields([image_id for statement in chosen for image_id in statement.image_ids])
        labels = [statement.label for statement in chosen if statement.label is not None]
        return {
            **self.sentences.fields([statement.sentence for statement in chosen]),
            **{name: field.view(len(chosen), 2, *field.shape[1:]) for name, field in images.items()},
            **({"targets": torch.tensor(labels)} if labels else {}),
        }


def _check_labels(labelled: Sequence[bool]) -> None:
    if not labelled or 0 < sum(labelled) < len(labelled):
        found = "none" if not labelled else f"{sum(labelled)} of {len(labelled)} with one"
        raise DataError(f"expected one example or more, all with a label or all without, got {found}; part them")
