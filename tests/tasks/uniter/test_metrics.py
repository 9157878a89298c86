"""VCR's three accuracies, recall both ways and overlaps, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.tasks.uniter.metrics import overlaps, recall, region_accuracy, vcr_accuracy

ANSWERS, RATIONALES = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0])


def choices(columns: int, right: list[tuple[bool, bool]], seed: int = 0) -> Tensor:
    """Scores by which each question is answered, and justified given its right answer, rightly or not."""
    scores = torch.rand(len(right), columns, generator=torch.Generator().manual_seed(seed))
    for row, (answered, justified) in enumerate(right):
        answer, rationale = ANSWERS[row], RATIONALES[row]
        first = 4 if columns == 8 else 4 + 4 * answer
        scores[row, answer] = 2.0 if answered else -1.0
        scores[row, first + rationale] = 2.0 if justified else -1.0
    return scores


@pytest.mark.parametrize("columns", [8, 20])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_vcr_counts_answers_rationales_and_both_of_several_questions(columns: int, shape: tuple[int, ...]) -> None:
    scores = choices(columns, [(True, True), (True, False), (False, True)])
    found = vcr_accuracy(scores, ANSWERS.reshape(shape), RATIONALES.reshape(shape))
    assert (found.qa, found.qar, found.both) == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    assert found.qa_loss == pytest.approx(F.cross_entropy(scores[:, :4].double(), ANSWERS).item())
    blocks = [scores[row, 4:8] if columns == 8 else scores[row].view(5, 4)[1 + ANSWERS[row]] for row in range(3)]
    assert found.qar_loss == pytest.approx(F.cross_entropy(torch.stack(blocks).double(), RATIONALES).item())


def test_vcrs_20_columns_hold_its_8() -> None:
    wide = choices(20, [(True, False), (False, False), (True, True)])
    rows = zip(wide, ANSWERS, strict=True)
    narrow = torch.stack([torch.cat([row[:4], row.view(5, 4)[1 + answer]]) for row, answer in rows])
    assert vcr_accuracy(wide, ANSWERS, RATIONALES) == vcr_accuracy(narrow, ANSWERS, RATIONALES)
    assert vcr_accuracy(wide, ANSWERS, RATIONALES, published=True) != vcr_accuracy(wide, ANSWERS, RATIONALES)
    for one in range(3):  # of one question the published count is right
        row = wide[one : one + 1], ANSWERS[one : one + 1], RATIONALES[one : one + 1]
        assert vcr_accuracy(*row, published=True) == vcr_accuracy(*row)


@pytest.mark.parametrize(
    ("scores", "answers", "rationales", "error", "said"),
    [
        (torch.rand(3, 7), ANSWERS, RATIONALES, ShapeError, r"\(N, 8\) or \(N, 20\), got \(3, 7\)"),
        (torch.rand(0, 8), ANSWERS[:0], RATIONALES[:0], ShapeError, r"got \(0, 8\)"),
        (
            torch.full((3, 8), torch.nan),
            ANSWERS,
            RATIONALES,
            DataError,
            r"finite scores, got others in rows \[0, 1, 2\]",
        ),
        (torch.rand(3, 8), ANSWERS[:2], RATIONALES, ShapeError, r"answers of shape \(N,\) = \(3,\)"),
        (
            torch.rand(3, 8),
            ANSWERS,
            RATIONALES + 2,
            DataError,
            r"rationales as the right choice, 0 to 3, got \[2, 3, 5\]",
        ),
        (torch.rand(3, 8), ANSWERS.float(), RATIONALES, DataError, "answers as the right choice"),
    ],
)
def test_vcrs_scores_that_do_not_fit_are_refused(
    scores: Tensor, answers: Tensor, rationales: Tensor, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        vcr_accuracy(scores, answers, rationales)


SCORES = torch.tensor(
    [  # images:  0    1    2
        [0.9, 0.1, 0.2],  # of image 0: first
        [0.3, 0.4, 0.8],  # of image 1: second
        [0.5, 0.6, 0.7],  # of image 1: second
        [0.4, 0.2, 0.1],  # of image 2: third
    ]
)
IMAGES = torch.tensor([0, 1, 1, 2])


def test_recall_counts_texts_with_their_image_and_images_with_any_of_their_texts() -> None:
    found = recall(SCORES, IMAGES, at=(1, 2, 3))
    assert found.image == pytest.approx({1: 1 / 4, 2: 3 / 4, 3: 1.0})
    # down the columns: image 0 has its text first; image 1 its second one first; image 2 its text last of four
    assert found.text == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 2 / 3})
    assert found.mean == pytest.approx((2 / 3 + (1 / 4 + 3 / 4 + 1) / 3) / 2)


def test_published_image_recall_adds_the_first_texts_of_the_list() -> None:
    found, plain = recall(SCORES, IMAGES, at=(1, 2, 3), published=True), recall(SCORES, IMAGES, at=(1, 2, 3))
    assert found.text == plain.text
    assert found.image == pytest.approx({1: 1 / 4 + 1 / 4, 2: 3 / 4 + 2 / 4, 3: 1 + 3 / 4})


def test_recall_of_a_right_ranking_is_one_and_order_of_texts_and_images_does_not_matter() -> None:
    images = torch.arange(30) // 5
    right = F.one_hot(images, 6).double() + torch.rand(30, 6, generator=torch.Generator().manual_seed(0)).double() / 2
    assert set(recall(right, images).image.values()) | set(recall(right, images).text.values()) == {1.0}
    scores = torch.rand(30, 6, generator=torch.Generator().manual_seed(1))
    texts, pictures = torch.randperm(30), torch.randperm(6)
    moved = recall(scores[texts][:, pictures], pictures.argsort()[images[texts]])
    assert moved == recall(scores, images)


def test_of_equal_scores_the_first_counts_as_the_better() -> None:
    scores, images = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
    assert recall(scores, images, at=(1, 2)).image == {1: 0.5, 2: 1.0}
    assert recall(scores, images, at=(1, 2, 3)).text == {1: 0.5, 2: 0.5, 3: 1.0}


@pytest.mark.parametrize(
    ("scores", "images", "at", "error", "said"),
    [
        (SCORES[0], IMAGES, (1,), ShapeError, r"scores \(T, I\).*got \(3,\) and \(4,\)"),
        (SCORES, IMAGES[:3], (1,), ShapeError, r"got \(4, 3\) and \(3,\)"),
        (SCORES, torch.tensor([0, 1, 1, 3]), (1,), DataError, r"texts \[3\] and images \[2\]"),
        (SCORES * torch.inf, IMAGES, (1,), DataError, "finite scores"),
        (SCORES, IMAGES, (), ConfigurationError, r"whole numbers of 1 or more, got \(\)"),
        (SCORES, IMAGES, (0, 5), ConfigurationError, "got"),
    ],
)
def test_scores_of_pairs_that_do_not_fit_are_refused(
    scores: Tensor, images: Tensor, at: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        recall(scores, images, at=at)


def test_overlaps_are_those_by_hand() -> None:
    box = torch.tensor([[10.0, 10, 20, 10]])
    others = torch.tensor(
        [[10.0, 10, 20, 10], [20, 10, 20, 10], [10, 15, 20, 10], [30, 10, 5, 5], [12, 12, 10, 5], [29.5, 10, 20, 10]]
    )
    expected = torch.tensor([1.0, 1 / 3, 1 / 3, 0, 1 / 4, 5 / 395], dtype=torch.float64)
    found = overlaps(box.expand(6, 4), others)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(overlaps(others, box.expand(6, 4)), expected)
    assert overlaps(box.expand(6, 4), others, published=True)[-1] == 0  # half a pixel wide
    assert overlaps(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


def test_a_region_is_right_by_more_than_half() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4)
    others = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.1]])  # overlaps 1, 0.5, 0.51
    assert region_accuracy(box, others) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("found", "meant", "error", "said"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 4), ShapeError, r"got \(2, 4\) and \(3, 4\)"),
        (torch.zeros(2, 7), torch.zeros(2, 7), ShapeError, r"\(N, 4\)"),
        (torch.zeros(1, 4), torch.tensor([[0.0, 0, -1, 2]]), DataError, r"boxes meant .* rows \[0\]"),
        (torch.tensor([[0.0, 0, 1, torch.nan]]), torch.zeros(1, 4), DataError, "finite found"),
        (torch.zeros(0, 4), torch.zeros(0, 4), DataError, "split empty"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(found: Tensor, meant: Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        region_accuracy(found, meant)
