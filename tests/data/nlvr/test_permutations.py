"""Permuted statements keep the truth, and relations say how objects stand to each other."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.nlvr_files import write_corpus

from advvl.data.nlvr.corpus import FEATURES, nlvr_corpus
from advvl.data.nlvr.permutations import permutations, permuted
from advvl.data.nlvr.relations import RELATIONS, relations
from advvl.data.nlvr.statements import COLORS, SHAPES, Item, Statement
from advvl.errors import DataError

BOXES = (
    (Item(0, 10, 20, "circle", "blue"), Item(50, 60, 10, "square", "black"), Item(50, 40, 20, "square", "yellow")),
    (Item(30, 5, 30, "triangle", "yellow"),),
    (Item(75, 70, 20, "circle", "black"), Item(10, 10, 10, "triangle", "blue")),
)
TOWERS = tuple(
    tuple(Item(40, 80 - 21 * level, 20, "square", color) for level, color in enumerate(colors))
    for colors in (("blue", "black"), ("yellow",), ("black", "black", "blue"))
)


def stated(sentence: str, boxes: tuple[tuple[Item, ...], ...] = BOXES) -> Statement:
    return Statement("1-0", sentence, boxes, True, "2")


def variants(statement: Statement, count: int = 200) -> list[Statement]:
    generator = torch.Generator().manual_seed(0)
    return [permuted(statement, generator) for _ in range(count)]


def kinds(statement: Statement) -> Counter[tuple[str, str]]:
    return Counter((item.color, item.shape) for box in statement.boxes for item in box)


def exists(statement: Statement) -> bool:
    """Whether some object has the colour and the shape that the sentence names."""
    color, shape = re.fullmatch(r"There is a (\w+) (\w+)\.", statement.sentence).groups()  # type: ignore[union-attr]
    return (color, shape) in kinds(statement)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_truth_of_a_permuted_statement_is_that_of_the_statement(color: str, shape: str) -> None:
    first = stated(f"There is a {color} {shape}.")
    found = variants(first)
    assert {exists(one) for one in found} == {exists(first)}
    assert len({one.sentence for one in found}) == 9


def test_boxes_stay_together_and_come_in_every_order() -> None:
    found = variants(stated("There is a blue block."))
    assert {tuple(len(box) for box in one.boxes) for one in found} == {
        (1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1),
    }  # fmt: skip
    for one in found:
        assert sorted(item.size for box in one.boxes for item in box) == [10, 10, 20, 20, 20, 30]
        assert {item.y for box in one.boxes for item in box} == {5, 10, 40, 60, 70}


def test_boxes_are_mirrored_unless_the_sentence_has_sides() -> None:
    edges = {min(item.x for box in one.boxes for item in box) for one in variants(stated("There is a blue item."))}
    assert edges == {0, 5}
    for side in ("left", "Right"):
        found = variants(stated(f"There is a blue item on the {side}."))
        assert {min(item.x for box in one.boxes for item in box) for one in found} == {0}


@pytest.mark.parametrize(
    "sentence", ["One of the grey square has a circle", "There is a squere", "a block or a square"]
)
def test_shapes_stay_where_their_words_may_mean_another_thing(sentence: str) -> None:
    for one in variants(stated(sentence)):
        assert one.sentence == sentence
        assert [item.shape for box in one.boxes if len(box) == 1 for item in box] == ["triangle"]


def test_towers_stay_towers() -> None:
    for one in variants(stated("There is a black square over a blue one.", TOWERS)):
        assert {shape for _, shape in kinds(one)} == {"square"}
        assert "square" in one.sentence
        for box in one.boxes:
            assert all(upper.y - lower.y == -21 for lower, upper in pairwise(box))


def test_a_word_that_a_colour_is_written_together_with_is_changed_too() -> None:
    assert {one.sentence for one in variants(stated("There is ablue Item"))} == {
        f"There is a{color} Item" for color in COLORS
    }


def test_copies_follow_from_the_seed_and_the_first_is_the_statement() -> None:
    first = [stated("There is a blue item."), replace(stated("There is a black item."), identifier="2-0")]
    found = permutations(first, 3, 5)
    assert found == permutations(first, 3, 5)
    assert found != permutations(first, 3, 6)
    assert [found[0], found[3]] == first
    assert [one.identifier for one in found] == ["1-0", "1-0.1", "1-0.2", "2-0", "2-0.1", "2-0.2"]


def test_relations_say_walls_neighbours_levels_and_counts() -> None:
    first, black, yellow = relations(BOXES)[0]
    assert all(len(one) == RELATIONS for box in relations(BOXES) for one in box)
    assert first[:4] == [1, 0, 0, 0]  # the left wall alone
    assert first[12:14] == [1, 0]  # some wall, nothing else
    assert black[4:12] == [0, 0, 0, 1, 1, 0, 0, 0]  # yellow lies on it, and nothing under it
    assert yellow[4:12] == [1, 0, 0, 0, 0, 1, 0, 0]  # nothing on it, black under it
    assert black[12:14] == [0, 1]
    assert yellow[14:18] == [1, 0, 0, 0]  # one object is lower
    assert first[18:26] == [1, 1, 1, 0, 0, 0, 0, 0]  # three in the box
    assert first[26:35] == [1, 0, 0, 1, 0, 0, 1, 0, 0]  # one of each colour
    assert first[35:44] == [1, 1, 0, 0, 0, 0, 1, 0, 0]  # two squares, no triangle, one circle
    assert [sum(first[start : start + 8]) for start in (44, 52, 60)] == [2, 2, 1]  # blue, circles, blue circles
    towers = relations(TOWERS)
    assert [sum(one[14:18]) for one in towers[2]] == [0, 1, 2]
    assert towers[2][1][4:12] == [0, 0, 1, 0, 0, 1, 0, 0]  # blue above, black below


def test_the_corpus_has_three_parts_and_true_statements_to_pretrain(tmp_path: Path) -> None:
    corpus = nlvr_corpus(write_corpus(tmp_path), copies=3, fold="5", seed=0)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (3 * 40, 8, 48)
    assert {one.fold for one in corpus.statements["validation"]} == {"5"}
    assert "5" not in {one.fold for one in corpus.statements["train"]}
    batch = corpus.test.batch(range(48))
    assert batch["targets"].tolist() == [[1 - number % 2, number % 2] for number in range(48)]
    assert batch["img_feat"].shape == (48, 6, FEATURES + RELATIONS)
    assert corpus.feature_dim == FEATURES + RELATIONS
    assert len(corpus.pretrain) == 3 * 20
    assert corpus.max_text_length >= int(batch["txt_lens"].max())


def test_a_part_without_statements_or_labels_is_refused(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path)
    with pytest.raises(DataError, match="to make the validation part, all with labels, got 0 of 0"):
        nlvr_corpus(folder, copies=1, fold="9", seed=0)
    text = (folder / "test.json").read_text().replace('"label": "true", ', "", 1)
    (folder / "test.json").write_text(text)
    with pytest.raises(DataError, match="got 47 of 48"):
        nlvr_corpus(folder, copies=1, fold="5", seed=0)
