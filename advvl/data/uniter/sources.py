"""Sources of batches for UNITER with texts and images in memory: labelled pairs, and captions for pre-training.

Both have `len()`, the number of examples, and `batch(indices, generator)`, which depends on nothing else. An example's
corruption depends on the generator's seed and the example alone, not on which others are in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, get_args

import torch
from torch import Tensor

from advvl.checks import check_functions, is_choice, is_number, shown
from advvl.data.masking import MASK_PROBABILITY, mismatch
from advvl.data.row_draws import RowDraws
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import Images, Texts, join
from advvl.data.uniter.corruption import Task, corrupt
from advvl.data.wordpiece import MASK
from advvl.errors import ConfigurationError

TASKS: Final = get_args(Task)
DEFAULT_TASKS: Final[tuple[Task, ...]] = ("mlm", "mlm", "mlm", "mlm", "itm", "mrfr")


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
class LabelledSource:
    """Texts with an image each, and their labels.

    Arguments:
        texts: N of them.
        images: M of them.
        image_rows: (N,), the image of each text.
        labels: further fields of a batch by name, (N, …) each.
    """

    texts: Texts
    images: Images
    image_rows: Tensor
    labels: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.texts.lengths)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return the examples at `indices` with UNITER's fields; nothing is drawn from the generator.

        Raises:
            DataError: no index, or one that is out of range.
        """
        del generator
        rows = checked_rows(indices, len(self))
        pairs = join(self.texts, rows, self.images, self.image_rows[rows])
        return {**pairs, **{name: label[rows] for name, label in self.labels.items()}}


@dataclass(frozen=True, eq=False)
class CaptionSource:
    """Captions for pre-training: each batch is of one task, drawn from `tasks`.

    Arguments:
        texts, images, image_rows: as of a `LabelledSource`.
        replacements: the range of ids [low, high) that wrong words come from.
        word_mask: the share of words that MLM hides.
        tasks: of pre-training; one named twice is drawn twice as often.
        negatives: makes the batches of "itm" from this source, the rows and their draws; None: half of them show another
            image, drawn from all.

    Raises:
        ConfigurationError: an unknown task, or a share outside [0, 1].
    """

    texts: Texts
    images: Images
    image_rows: Tensor
    _: KW_ONLY
    replacements: tuple[int, int]
    word_mask: float = MASK_PROBABILITY
    tasks: tuple[Task, ...] = DEFAULT_TASKS
    negatives: Callable[[CaptionSource, Tensor, RowDraws], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        check_share(self.word_mask)
        check_functions(negatives=self.negatives)

    def __len__(self) -> int:
        return len(self.texts.lengths)

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        return MASK

    @property
    def image_pools(self) -> Tensor:
        """The number of each image's pool, `(M,)`; a mismatch is drawn from the pool of the true image, here from all."""
        return torch.zeros(len(self.images.lengths), dtype=torch.long)

    def read_texts(self, rows: Tensor) -> Texts:
        """Return the captions of rows `(B,)`."""
        lengths = self.texts.lengths[rows]
        return Texts(self.texts.ids[rows, : int(lengths.max())], lengths)

    def read_images(self, numbers: Tensor) -> Images:
        """Return the images of numbers `(B,)`."""
        lengths = self.images.lengths[numbers]
        most = int(lengths.max())
        parts = (self.images.features, self.images.boxes, self.images.labels)
        features, boxes, labels = (part[numbers, :most] for part in parts)
        return Images(features, boxes, lengths, labels)

    def mismatches(self, rows: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the images to show with captions.

        Arguments:
            rows: of the captions, `(B,)`.

        Returns:
            The numbers of their own images `(B,)` and of those to show `(B,)`, and the labels `(B,)`: 1 for a match.
        """
        own = self.image_rows[rows]
        return own, *mismatch(own, len(self.images.lengths), draws=draws)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Return the captions at `indices`, corrupted for a task drawn from the generator, whose name is under `"task"`.

        Raises:
            DataError: no index, or one that is out of range.
        """
        rows = checked_rows(indices, len(self))
        task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
        draws = RowDraws.of(rows, generator)
        if task == "itm" and self.negatives is not None:
            return {**self.negatives(self, rows, draws), "task": task}
        if task == "itm":
            _, shown, targets = self.mismatches(rows, draws)
            return {**join(self.texts, rows, self.images, shown), "targets": targets, "task": task}
        batch = join(self.texts, rows, self.images, self.image_rows[rows])
        return corrupt(
            batch,
            self.images.labels[self.image_rows[rows], : batch["img_feat"].shape[1]],
            task,
            probability=self.word_mask if task == "mlm" else MASK_PROBABILITY,
            draws=draws,
            replacements=self.replacements,
        )
