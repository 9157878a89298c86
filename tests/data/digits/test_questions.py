"""Every answer is derived again, from the words of the question and the drawn picture alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from support.picture_reading import answer

from advvl.data.digits.answers import ANSWERS
from advvl.data.digits.draws import stream
from advvl.data.digits.questions import FAMILIES, Question, ask
from advvl.data.digits.scans import load_digit_images, split_images
from advvl.data.digits.scenes import Scene, box, draw_scene, images_by_digit

pytestmark = pytest.mark.slow


def made(seed: int, scenes: int, per_scene: int) -> tuple[list[Scene], list[Question]]:
    scans = load_digit_images()
    pool = images_by_digit(split_images(scans.classes, train=300, validation=400, seed=0).train, scans.classes)
    rng = stream(seed, 1)
    drawn = [draw_scene(rng, pool) for _ in range(scenes)]
    return drawn, ask(rng, drawn, per_scene=per_scene)


def test_every_answer_can_be_read_off_the_picture() -> None:
    scenes, questions = made(seed=0, scenes=1000, per_scene=4)
    for question in questions:
        assert question.answer in ANSWERS
        assert answer(str(scenes[question.scene]), question.text) == question.answer, question


@pytest.mark.parametrize("family", FAMILIES)
def test_every_question_that_could_be_asked_has_the_answer_of_the_picture(family: str) -> None:
    scenes, _ = made(seed=1, scenes=120, per_scene=1)
    asked = 0
    for scene in scenes:
        for text, given in FAMILIES[family](scene):
            assert answer(str(scene), text) == given, f"{text}\n{scene}"
            asked += 1
    assert asked >= len(scenes)


def test_a_picture_shows_its_scene() -> None:
    scene = Scene(cells=(1, 3, 8), digits=(7, 0, 7), images=(5, 6, 9))
    assert str(scene) == "· 7 ·\n0 · ·\n· · 7"
    assert answer(str(scene), "is there a seven left of a zero") == "no"


def test_scenes_hold_three_to_six_digits_in_cells_of_their_own_and_scans_of_their_digit() -> None:
    scans = load_digit_images()
    scenes, _ = made(seed=2, scenes=500, per_scene=1)
    assert Counter(map(len, scenes)).keys() == {3, 4, 5, 6}
    for scene in scenes:
        assert list(scene.cells) == sorted(set(scene.cells))
        assert set(scene.cells) <= set(range(9))
        assert scans.classes[list(scene.images)].tolist() == list(scene.digits)
    assert len({scene.cells for scene in scenes}) > 200


def test_boxes_tile_the_picture() -> None:
    boxes = np.array([box(cell) for cell in range(9)])
    x1, y1, x2, y2, width, height, area = boxes.T
    np.testing.assert_allclose([x2 - x1, y2 - y1, width * height], [width, height, area], rtol=1e-12)
    assert area.sum() == pytest.approx(1.0)
    assert boxes[5, :4].tolist() == pytest.approx([2 / 3, 1 / 3, 1, 2 / 3])


def test_families_are_asked_alike_and_no_answer_dominates_one() -> None:
    _, questions = made(seed=3, scenes=1000, per_scene=4)
    asked = Counter(question.family for question in questions)
    assert asked.keys() == FAMILIES.keys()
    assert max(asked.values()) - min(asked.values()) <= 4
    for family in FAMILIES:
        answers = Counter(question.answer for question in questions if question.family == family)
        ceiling = {"exists": 0.505, "relation": 0.505, "more": 0.505, "place": 0.345}.get(family, 0.25)
        assert answers.most_common(1)[0][1] / asked[family] <= ceiling, (family, answers)


def test_the_words_of_a_question_hardly_tell_its_answer() -> None:
    _, train = made(seed=4, scenes=1000, per_scene=4)
    _, test = made(seed=5, scenes=500, per_scene=4)
    seen: dict[str, Counter[str]] = {}
    for question in train:
        seen.setdefault(question.text, Counter())[question.answer] += 1
    guessed = sum(seen[q.text].most_common(1)[0][0] == q.answer for q in test if q.text in seen)
    assert guessed / len(test) < 0.32


def test_a_scene_is_asked_questions_of_distinct_families() -> None:
    _, questions = made(seed=6, scenes=200, per_scene=6)
    assert len(questions) == 1200
    assert len({(question.scene, question.family) for question in questions}) == 1200


def test_a_scene_of_one_digit_six_times_is_still_asked_six_families() -> None:
    scene = Scene(cells=(0, 1, 2, 3, 4, 5), digits=(8,) * 6, images=(0,) * 6)
    asked = ask(stream(0, 0), [scene], per_scene=6)
    assert {question.family for question in asked} == {"exists", "count", "total", "parity", "at", "extreme"}
