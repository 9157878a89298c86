"""The sources of batches for a training loop: questions for VQA, captions for pre-training.

Both have `len()`, the number of examples, and `batch(indices, generator)`, which depends on nothing else. An example's
corruption depends on the generator's seed and the example alone, not on which others are in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advvl.checks import is_choice, is_number, shown
from advvl.data.digits.captions import Caption
from advvl.data.digits.questions import Question
from advvl.data.digits.scenes import Scene
from advvl.data.masking import MASK_PROBABILITY, mask_regions, mask_words, mismatch
from advvl.data.row_draws import RowDraws
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import Images, Texts, hide_regions, join
from advvl.errors import ConfigurationError

TASKS = ("mlm", "itm", "mrfr", "mrc", "mrc-kl")
DEFAULT_TASKS = ("mlm", "mlm", "mlm", "mlm", "itm", "mrfr")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ConfigurationError unless `tasks` names one or more tasks that exist."""
    named = isinstance(tasks, list | tuple) and all(is_choice(task, TASKS) for task in tasks)
    if not named or not tasks:
        raise ConfigurationError(
            f"expected tasks to be a tuple of one or more of {', '.join(TASKS)}, got {shown(tasks)}"
        )


def check_share(word_mask: float) -> None:
    """Raise ConfigurationError unless `word_mask` is a share."""
    if not is_number(word_mask) or not 0.0 <= word_mask <= 1.0:
        raise ConfigurationError(f"expected word_mask to be a share in [0, 1], got {shown(word_mask)}")


@dataclass(frozen=True, eq=False)
class QuestionSource:
    """Questions about scenes: question `i` about image `image_rows[i]`, with the soft scores `targets[i]` (N, A)."""

    scenes: Sequence[Scene]
    questions: Sequence[Question]
    texts: Texts
    images: Images
    image_rows: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """The questions at `indices` with UNITER's fields for VQA; nothing is drawn from the generator."""
        del generator
        rows = checked_rows(indices, len(self))
        return {**join(self.texts, rows, self.images, self.image_rows[rows]), "targets": self.targets[rows]}


@dataclass(frozen=True, eq=False)
class CaptionSource:
    """Captions of scenes for pre-training: each batch is of one task, drawn from `tasks`.

    `replacements` is the range of ids [low, high) that wrong words come from, `word_mask` the share of words that MLM
    hides.
    """

    scenes: Sequence[Scene]
    captions: Sequence[Caption]
    texts: Texts
    images: Images
    image_rows: Tensor
    replacements: tuple[int, int]
    word_mask: float = MASK_PROBABILITY
    tasks: tuple[str, ...] = DEFAULT_TASKS

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        check_share(self.word_mask)

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The captions at `indices`, corrupted for a task drawn from the generator, whose name is under `"task"`."""
        rows = checked_rows(indices, len(self))
        task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
        draws = RowDraws.of(rows, generator)
        if task == "itm":
            shown, targets = mismatch(self.image_rows[rows], len(self.scenes), draws=draws)
            return {**join(self.texts, rows, self.images, shown), "targets": targets, "task": task}
        batch = join(self.texts, rows, self.images, self.image_rows[rows])
        if task == "mlm":
            input_ids, labels = mask_words(
                batch["input_ids"], self.replacements, probability=self.word_mask, draws=draws
            )
            return {**batch, "input_ids": input_ids, "txt_labels": labels, "task": task}
        masks = mask_regions(batch["num_bbs"], draws=draws)
        hidden: dict[str, Any] = hide_regions(batch, masks)
        if task == "mrfr":
            return {**hidden, "feat_targets": batch["img_feat"][masks], "task": task}
        labels = self.images.labels[self.image_rows[rows], : masks.shape[1]]
        return {**hidden, "label_targets": labels[masks], "task": task}
