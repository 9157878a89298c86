"""The corruptions of pre-training: masked words, masked regions, and wrong images. Each row's draws are its own.

Chen et al., "UNITER" (ECCV 2020) and its released code, with one difference: if no word of a text was chosen, a random
one is masked, as for regions, instead of always the first.
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
    """Choose each allowed place with `probability`, and at least one per row.

    Arguments:
        allowed: `(B, L)` bool.
        probability: of each place, in [0, 1].
        draws: the random numbers of the rows.

    Returns:
        The chosen places, `(B, L)` bool.

    Raises:
        DataError: a row allows none.
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
    words: Tensor | None = None,
    mask: int = MASK,
) -> tuple[Tensor, Tensor]:
    """Mask words for MLM: of those chosen 80% become [MASK], 10% a draw from `replacements`, 10% stay.

    Arguments:
        input_ids: `(B, L)`.
        replacements: the range of ids [low, high) that wrong words come from.
        words: `(B, L)` bool, which may be chosen; None: all but the special tokens of `advvl.data.wordpiece`. Or of K parts
            of a text, `(K, B, L)`: at least one word of each is chosen.
        mask: the id of [MASK].

    Returns:
        The corrupted ids `(B, L)`, and the labels `(B, L)`: the true id where chosen, -1 elsewhere.
    """
    width, (low, high) = input_ids.shape[1], replacements
    allowed = input_ids >= len(SPECIALS) if words is None else words
    parts = allowed[None] if allowed.ndim == 2 else allowed
    chosen = torch.stack([choose(part, probability=probability, draws=draws) for part in parts]).any(0)
    fate = draws.uniform("fate", width)
    wrong = low + (draws.uniform("word", width) * (high - low)).long()
    corrupted = torch.where(chosen & (fate < 0.8), mask, input_ids)
    corrupted = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), wrong, corrupted)
    return corrupted, torch.where(chosen, input_ids, IGNORED)


def mask_regions(num_bbs: Tensor, *, probability: float = MASK_PROBABILITY, draws: RowDraws) -> Tensor:
    """Choose the regions to hide, `(B, R)` bool for `num_bbs` `(B,)`: each with `probability`, at least one per row."""
    places = torch.arange(int(num_bbs.max()))
    return choose(places < num_bbs[:, None], probability=probability, draws=draws)


def mismatch(
    images: Tensor, count: int | Tensor, *, probability: float = NEGATIVE_PROBABILITY, draws: RowDraws
) -> tuple[Tensor, Tensor]:
    """Replace images for image-text matching: with `probability` another of `count` images, each equally likely.

    Arguments:
        images: `(B,)` long, each text's own image.
        count: of images; or `(B,)`, of those among which each row's is.

    Returns:
        The image to show `(B,)`, and the label `(B,)`: 1 for its own, 0 for another.

    Raises:
        DataError: fewer than 2 images.
    """
    fewest = int(torch.as_tensor(count).min())
    if fewest < 2:
        raise DataError(f"expected at least 2 images to draw a wrong one from, got {fewest}")
    others = (draws.uniform("image", 1)[:, 0] * (count - 1)).long()
    others = others + (others >= images)
    matched = draws.uniform("match", 1)[:, 0] >= probability
    return torch.where(matched, images, others), matched.long()
