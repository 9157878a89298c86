"""Captions are read back by a parser of their words and held against pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from support.picture_reading import holds

from advvl.data.digits.captions import KINDS, Caption, describe
from advvl.data.digits.draws import stream
from advvl.data.digits.scans import load_digit_images
from advvl.data.digits.scenes import Scene, draw_scene, images_by_digit


def made(seed: int, scenes: int, per_scene: int) -> tuple[list[Scene], list[Caption]]:
    scans = load_digit_images()
    pool = images_by_digit(np.arange(1797), scans.classes)
    rng = stream(seed, 2)
    drawn = [draw_scene(rng, pool) for _ in range(scenes)]
    return drawn, describe(rng, drawn, per_scene=per_scene)


def test_every_caption_is_true_of_its_scene() -> None:
    scenes, captions = made(seed=0, scenes=400, per_scene=3)
    for caption in captions:
        assert holds(str(scenes[caption.scene]), caption.text), f"{caption.text}\n{scenes[caption.scene]}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_false_of_nearly_every_other_scene(kind: str) -> None:
    scenes, captions = made(seed=1, scenes=150, per_scene=3)
    others = [
        holds(str(scenes[(caption.scene + shift) % len(scenes)]), caption.text)
        for caption in captions
        if caption.kind == kind
        for shift in range(1, 20)
    ]
    assert sum(others) / len(others) < 0.03


def test_captions_of_a_scene_are_of_distinct_kinds_and_kinds_come_alike() -> None:
    _, captions = made(seed=2, scenes=1000, per_scene=2)
    assert len({(caption.scene, caption.kind) for caption in captions}) == len(captions) == 2000
    assert all(abs(count - 667) < 60 for count in Counter(caption.kind for caption in captions).values())


def test_captions_vary() -> None:
    _, captions = made(seed=3, scenes=1000, per_scene=2)
    assert len({caption.text for caption in captions}) > 0.9 * len(captions)
