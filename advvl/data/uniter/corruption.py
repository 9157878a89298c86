"""Batches of pre-training: words of a text, or regions of an image, are hidden and asked for.

Source: Chen et al., "UNITER", ECCV 2020, and its published code.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from torch import Tensor

from advvl.data.masking import mask_regions, mask_words
from advvl.data.row_draws import RowDraws
from advvl.data.uniter.batching import hide_regions
from advvl.data.wordpiece import MASK

Task = Literal["mlm", "itm", "mrfr", "mrc", "mrc-kl"]
WITH_LABELS: Final = ("mrc", "mrc-kl")


def corrupt(
    batch: dict[str, Tensor],
    labels: Tensor,
    task: Task,
    *,
    probability: float,
    draws: RowDraws,
    replacements: tuple[int, int],
    words: Tensor | None = None,
    mask: int = MASK,
) -> dict[str, Any]:
    """Hide words of a batch for "mlm", or regions for any other task but "itm", and ask for them.

    Arguments:
        labels: the distribution over classes of each region, `(B, R, C)`; only `WITH_LABELS` read them.
        probability: of each word or region to be hidden.
        replacements, words, mask: as `advvl.data.masking.mask_words` takes them.
    """
    if task == "mlm":
        ids, hidden_words = mask_words(
            batch["input_ids"], replacements, probability=probability, draws=draws, words=words, mask=mask
        )
        return {**batch, "input_ids": ids, "txt_labels": hidden_words, "task": task}
    masks = mask_regions(batch["num_bbs"], probability=probability, draws=draws)
    hidden = hide_regions(batch, masks)
    if task == "mrfr":
        return {**hidden, "feat_targets": batch["img_feat"][masks], "task": task}
    return {**hidden, "label_targets": labels[masks], "task": task}
