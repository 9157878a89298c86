"""What pre-training hides: words, regions, and which image belongs to a text. Each row's draws are its own.

Chen et al., "UNITER" (ECCV 2020) and its released code, but for one choice: a text in which no word was chosen has one
drawn at random masked, as for regions, and not always its first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advvl.data.row_draws import RowDraws
from advvl.data.wordpiece import MASK, SPECIALS
from advvl.errors import DataError

MASK_PROBABILITY = 0.15
NEGATIVE_PROBABILITY = 0.5
IGNORED = -1


def choose(allowed: Tensor, *, probability: float, draws: RowDraws) -> Tensor:
    """Each allowed place with `probability`, and at least one a row: `(B, L)` bool of `(B, L)` bool.

    Raises `DataError` where a row allows none.
    """
    if not bool(allowed.any(1).all()):
        raise DataError("expected something to mask in every row, got a row with no word or no region; leave it out")
    drawn = draws.uniform("choose", allowed.shape[1]).masked_fill_(~allowed, 2.0)
    # The place with a row's lowest draw is uniform over the row also when no draw fell below the probability.
    return drawn <= drawn.amin(1, keepdim=True).clamp(min=probability)


def mask_words(
    input_ids: Tensor,
    replacements: tuple[int, int],
    *,
    probability: float = MASK_PROBABILITY,
    draws: RowDraws,
) -> tuple[Tensor, Tensor]:
    """Masks words for MLM: of those chosen 80% become [MASK], 10% a draw from `replacements` [low, high), 10% stay.

    Arguments: `input_ids` (B, L); special tokens and padding are never chosen.
    Returns: the corrupted ids (B, L), and the labels (B, L): the true id where chosen, -1 elsewhere.
    """
    width, (low, high) = input_ids.shape[1], replacements
    chosen = choose(input_ids >= len(SPECIALS), probability=probability, draws=draws)
    fate = draws.uniform("fate", width)
    wrong = low + (draws.uniform("word", width) * (high - low)).long()
    corrupted = torch.where(chosen & (fate < 0.8), MASK, input_ids)
    corrupted = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), wrong, corrupted)
    return corrupted, torch.where(chosen, input_ids, IGNORED)


def mask_regions(num_bbs: Tensor, *, probability: float = MASK_PROBABILITY, draws: RowDraws) -> Tensor:
    """The regions to hide, `(B, R)` bool for `num_bbs` (B,): each with `probability`, at least one a row."""
    places = torch.arange(int(num_bbs.max()))
    return choose(places < num_bbs[:, None], probability=probability, draws=draws)


def mismatch(
    images: Tensor, count: int, *, probability: float = NEGATIVE_PROBABILITY, draws: RowDraws
) -> tuple[Tensor, Tensor]:
    """For image-text matching: with `probability` another of the `count` images, each as likely as the next.

    Arguments: `images` (B,) long, each text's own image.
    Returns: the image to show (B,), and the label (B,): 1 its own, 0 another. Raises `DataError` for fewer than 2.
    """
    if count < 2:
        raise DataError(f"expected at least 2 images to draw a wrong one from, got {count}")
    others = (draws.uniform("image", 1)[:, 0] * (count - 1)).long()
    others = others + (others >= images)
    matched = draws.uniform("match", 1)[:, 0] >= probability
    return torch.where(matched, images, others), matched.long()
