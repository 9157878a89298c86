"""What pre-training hides, and how often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advvl.data.masking import choose, mask_regions, mask_words, mismatch
from advvl.data.row_draws import RowDraws
from advvl.data.wordpiece import CLS, MASK, PAD, SEP
from advvl.errors import DataError


def draws(rows: int, seed: int = 0) -> RowDraws:
    return RowDraws.of(range(rows), torch.Generator().manual_seed(seed))


def texts(lengths: list[int]) -> Tensor:
    """Rows of [CLS] words [SEP], zero padded; the ids of the words are 10 and up."""
    ids = torch.full((len(lengths), max(lengths) + 2), PAD)
    for row, length in enumerate(lengths):
        ids[row, 0] = CLS
        ids[row, 1 : length + 1] = 10 + torch.arange(length)
        ids[row, length + 1] = SEP
    return ids


@pytest.mark.slow
@given(st.lists(st.integers(1, 13), min_size=1, max_size=9), st.integers(0, 2**32), st.floats(0, 1))
def test_masked_words(lengths: list[int], seed: int, probability: float) -> None:
    ids = texts(lengths)
    corrupted, labels = mask_words(ids, (5, 40), probability=probability, draws=draws(len(ids), seed))
    chosen = labels != -1
    assert bool(chosen.any(1).all()), "at least one a row"
    assert not bool((chosen & (ids < 5)).any()), "never [CLS], [SEP] or padding"
    assert torch.equal(labels[chosen], ids[chosen]), "labels are the true words"
    assert torch.equal(corrupted[~chosen], ids[~chosen]), "other places stay"
    assert not bool(torch.isin(corrupted[chosen], torch.tensor([PAD, CLS, SEP])).any())


@pytest.mark.slow
@given(st.lists(st.integers(1, 7), min_size=1, max_size=9), st.integers(0, 2**32), st.floats(0, 1))
def test_masked_regions(counts: list[int], seed: int, probability: float) -> None:
    num_bbs = torch.tensor(counts)
    masks = mask_regions(num_bbs, probability=probability, draws=draws(len(counts), seed))
    assert masks.shape == (len(counts), max(counts))
    assert bool(masks.any(1).all()), "at least one a row"
    assert not bool((masks & (torch.arange(max(counts)) >= num_bbs[:, None])).any()), "never padding"


def test_eight_in_ten_masked_words_are_hidden_one_replaced_one_kept() -> None:
    ids = texts([30] * 2000)
    corrupted, labels = mask_words(ids, (50, 60), draws=draws(2000))
    chosen = labels != -1
    assert chosen.sum().item() / 60000 == pytest.approx(0.15, abs=0.01)
    fates = corrupted[chosen]
    assert (fates == MASK).double().mean().item() == pytest.approx(0.8, abs=0.015)
    replaced = fates[(fates >= 50) & (fates < 60)]
    assert len(replaced) / len(fates) == pytest.approx(0.1, abs=0.015)
    assert set(replaced.tolist()) == set(range(50, 60))
    assert (fates == labels[chosen]).double().mean().item() == pytest.approx(0.1, abs=0.015)


def test_the_one_that_is_chosen_when_chance_chose_none_may_be_any() -> None:
    allowed = torch.tensor([[False, True, True, True, False]]).expand(3000, 5)
    chosen = choose(allowed, probability=0.0, draws=draws(3000))
    assert torch.equal(chosen.sum(1), torch.ones(3000, dtype=torch.long))
    assert (chosen.double().mean(0)[1:4] - 1 / 3).abs().max().item() < 0.03


def test_a_row_with_nothing_to_mask_is_refused() -> None:
    with pytest.raises(DataError, match="no word or no region"):
        mask_words(torch.tensor([[CLS, 10, SEP], [CLS, SEP, PAD]]), (5, 40), draws=draws(2))


@given(st.integers(2, 9), st.integers(0, 2**32), st.floats(0, 1))
def test_a_pair_is_labelled_a_match_exactly_when_the_image_is_the_texts_own(
    count: int, seed: int, probability: float
) -> None:
    own = torch.arange(40) % count
    shown, labels = mismatch(own, count, probability=probability, draws=draws(40, seed))
    assert torch.equal(shown == own, labels == 1)
    assert bool(((shown >= 0) & (shown < count)).all())
    assert bool(((labels == 0) | (labels == 1)).all())


def test_half_of_the_pairs_are_wrong_and_wrong_images_are_equally_likely() -> None:
    own = torch.full((8000,), 2)
    shown, labels = mismatch(own, 5, draws=draws(8000))
    assert labels.double().mean().item() == pytest.approx(0.5, abs=0.02)
    counts = torch.bincount(shown[labels == 0], minlength=5).double()
    assert counts[2] == 0
    assert (counts[[0, 1, 3, 4]] / counts.sum() - 0.25).abs().max().item() < 0.03


@pytest.mark.parametrize(("probability", "label"), [(0.0, 1), (1.0, 0)], ids=["never", "always"])
def test_the_probability_is_that_of_a_wrong_image(probability: float, label: int) -> None:
    own = torch.arange(20)
    _, labels = mismatch(own, 20, probability=probability, draws=draws(20))
    assert torch.equal(labels, torch.full((20,), label))


def test_a_single_image_has_no_wrong_one() -> None:
    with pytest.raises(DataError, match="at least 2 images"):
        mismatch(torch.zeros(3, dtype=torch.long), 1, draws=draws(3))


def test_the_draws_alone_decide() -> None:
    ids = texts([9, 4, 7])
    first, again, other = (mask_words(ids, (5, 40), draws=draws(3, seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_word_of_each_part_of_a_text_is_masked() -> None:
    ids = torch.arange(5, 25).view(2, 10)
    parts = torch.stack([torch.arange(10) < 3, (torch.arange(10) >= 3) & (torch.arange(10) < 9)])[:, None].expand(
        2, 2, 10
    )
    for seed in range(50):
        draws = RowDraws.of([3, 8], torch.Generator().manual_seed(seed))
        _, labels = mask_words(ids, (5, 25), probability=0.01, draws=draws, words=parts)
        chosen = labels != -1
        assert (chosen & parts[0]).any(1).all()
        assert (chosen & parts[1]).any(1).all()
        assert not chosen[:, 9].any()
