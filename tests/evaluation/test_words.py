"""Changes of words: each keeps to its kind and budget, and the search finds the worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.words import (
    TYPOS,
    case,
    changed_words,
    keyboard,
    mismatched,
    spacing,
    swaps,
    synonyms,
    wordnet,
)

TEXTS = ["what colour is the dog", "is there a red car", "how many cats", "a"]


def test_each_change_gives_all_its_variants() -> None:
    assert keyboard("a") == ["s", "q", "w", "z"]
    assert keyboard("G1") == ["F1", "H1", "T1", "Y1", "V1", "B1"]
    assert swaps("dog") == ["odg", "dgo"]
    assert swaps("aa1") == []
    assert case("dog") == ["DOG", "Dog"]
    assert case("7") == []
    assert spacing("dog") == ["d og", "do g"]


def test_synonyms_keep_a_capital() -> None:
    change = synonyms({"dog": ["domestic dog", "hound"]})
    assert change("Dog") == ["Domestic dog", "Hound"]
    assert change("cat") == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        pytest.param("dog?", ["hound?"], id="mark"),
        pytest.param('("Dog,"...', ['("Hound,"...'], id="around"),
        pytest.param("DOG!", ["HOUND!"], id="capitals"),
        pytest.param("A,", ["One,"], id="one-letter"),
        pytest.param("u.s.", ["america"], id="listed-with-its-points"),
        pytest.param("'U.S.',", [], id="points-of-its-own"),
        pytest.param("dog's", [], id="another-word"),
        pytest.param("?!", [], id="no-word"),
        pytest.param("", [], id="empty"),
    ],
)
def test_synonyms_keep_the_punctuation_and_capitals_of_the_word(word: str, expected: list[str]) -> None:
    assert synonyms({"dog": ["hound"], "a": ["one"], "u.s.": ["america"]})(word) == expected


def test_a_search_changes_the_last_word_of_a_question() -> None:
    change = synonyms({"dog": ["hound"]})
    found = changed_words(
        ["is this a dog?"], lambda texts, rows: torch.tensor([-float(len(t)) for t in texts]), changes=(change,)
    )
    assert found.texts == ("is this a hound?",)


def by_letters(texts: list[str], rows: Tensor) -> Tensor:
    """A score that falls with every letter that is not of the example's own text, in its place."""
    return torch.tensor(
        [
            sum(a == b for a, b in zip(text, TEXTS[row], strict=False)) / max(len(text), len(TEXTS[row]))
            for text, row in zip(texts, rows.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("search", ["greedy", "random"])
@pytest.mark.parametrize("edits", [1, 2, 5])
def test_a_search_lowers_the_score_within_its_budget(search: Any, edits: int) -> None:
    found = changed_words(TEXTS, by_letters, changes=(keyboard, swaps, case), edits=edits, search=search)
    assert torch.equal(found.scores, by_letters(list(found.texts), torch.arange(4)).double())
    assert (found.scores < 1).all()
    for text, changed, count in zip(TEXTS, found.texts, found.edits.tolist(), strict=True):
        differ = sum(a != b for a, b in zip(text.split(" "), changed.split(" "), strict=True))
        assert differ == count <= edits


def test_the_greedy_search_finds_the_worst_single_change_when_it_tries_enough() -> None:
    def length(texts: list[str], rows: Tensor) -> Tensor:
        return torch.tensor([-float(len(text)) for text in texts])

    change = synonyms({"dog": ["hound", "domestic dog"], "is": ["be"]})
    found = changed_words([TEXTS[0]], length, changes=(change,), tries=50)
    assert found.texts == ("what colour is the domestic dog",)


def test_a_change_that_helps_the_model_is_not_kept() -> None:
    def likes_changes(texts: list[str], rows: Tensor) -> Tensor:
        return torch.tensor([float(text != TEXTS[row]) for text, row in zip(texts, rows.tolist(), strict=True)])

    found = changed_words(TEXTS, likes_changes, edits=3)
    assert found.texts == tuple(TEXTS)
    assert found.edits.tolist() == [0, 0, 0, 0]


def test_the_seed_decides_the_texts() -> None:
    found = [changed_words(TEXTS, by_letters, edits=2, tries=3, seed=seed).texts for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_texts_without_a_word_to_change_stay() -> None:
    found = changed_words(["", "7 8"], lambda texts, rows: torch.ones(len(texts)), changes=(case, swaps))
    assert found.texts == ("", "7 8")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        pytest.param([], {}, "one text or more", id="none"),
        pytest.param("one text", {}, "a list of one text", id="a-text"),
        pytest.param(TEXTS, {"edits": 0}, "expected edits", id="edits"),
        pytest.param(TEXTS, {"tries": 1.5}, "expected tries", id="tries"),
        pytest.param(TEXTS, {"search": "beam"}, "expected search to be one of", id="search"),
        pytest.param(TEXTS, {"changes": ()}, "one change of words", id="changes"),
        pytest.param(TEXTS, {"changes": case}, "a list of one change of words", id="one change"),
        pytest.param(TEXTS, {"changes": (str.upper,)}, "a change to give a list of variants", id="a word"),
        pytest.param(TEXTS, {"changes": (len,)}, "a change to give a list of variants", id="a number"),
        pytest.param(TEXTS, {"changes": ("typos",)}, "change 0 as a function", id="change"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(texts: Any, options: Any, message: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=message):
        changed_words(texts, by_letters, **options)


@pytest.mark.parametrize("of", [{"dog": "hound"}, {"dog": 3}, {"dog": ["hound", 3]}, {"Dog": ["hound"]}])
def test_synonyms_that_are_no_lists_of_words_are_refused(of: Any) -> None:
    with pytest.raises(DataError, match="a list of synonyms for each word in lower case"):
        synonyms(of)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="a finite score for each of 4 texts"):
        changed_words(TEXTS, lambda texts, rows: torch.full((len(texts),), value))
    with pytest.raises(DataError, match="a finite score"):
        changed_words(TEXTS, lambda texts, rows: torch.ones(1))


LICENCE = "  1 This software and database is being provided to you under a licence\n"
DATA = """00000100 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 00000300 n 0000 | a member of the genus | Canis
00000200 18 n 02 frump 0 dog 0 000 | a dull unattractive person
00000300 05 n 01 animal 0 000 | a living thing
"""
INDEX = """animal n 1 1 ~ 1 1 00000300
dog n 2 2 @ ~ 2 1 00000100 00000200
domestic_dog n 1 1 @ 1 0 00000100
frump n 1 1 @ 1 0 00000200
"""


def database(folder: Path, **files: str) -> Path:
    """A folder of WordNet's format with a few nouns and an adjective; `files` replaces some."""
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part}").write_text(LICENCE)
        (folder / f"index.{part}").write_text(LICENCE)
    (folder / "data.noun").write_text(LICENCE + DATA)
    (folder / "index.noun").write_text(LICENCE + INDEX)
    (folder / "data.adj").write_text("00000400 00 a 02 awake(p) 0 astir(p) 0 000 | not asleep\n")
    (folder / "index.adj").write_text("awake a 1 0 1 1 00000400\nastir a 1 0 1 0 00000400\n")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_wordnet_gives_synonyms_of_the_most_frequent_sense_first(tmp_path: Path) -> None:
    found = wordnet(database(tmp_path))
    assert found["dog"] == ["domestic dog", "Canis familiaris", "frump"]
    assert found["frump"] == ["dog"]
    assert found["awake"] == ["astir"]
    assert "animal" not in found
    assert synonyms(found)("Frump") == ["Dog"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({"data_noun": "00000100 05 n zz dog 0"}, r"data.noun', line 1; see wndb", id="count"),
        pytest.param({"data_noun": "00000100 05 n 09 dog 0"}, r"data.noun', line 1", id="short"),
        pytest.param({"index_noun": "dog n 1 0 1 1 00000999"}, r"index.noun', line 1", id="offset"),
        pytest.param({"index_noun": "dog"}, r"index.noun', line 1", id="index-short"),
    ],
)
def test_a_line_that_is_not_wordnets_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        wordnet(database(tmp_path, **files))


def test_a_folder_without_wordnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected WordNet's 'data.noun' in"):
        wordnet(tmp_path)


@pytest.mark.parametrize(
    "texts", [list("ab"), list("abc"), list("aabb"), list("aabcd") * 7, [str(i) for i in range(50)]]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_mismatched_caption_is_another_one(texts: list[str], seed: int) -> None:
    rows = mismatched(texts, seed=seed)
    assert sorted(rows.tolist()) == list(range(len(texts)))
    assert all(texts[row] != text for row, text in zip(rows.tolist(), texts, strict=True))
    assert torch.equal(rows, mismatched(texts, seed=seed))


def test_mismatches_depend_on_the_seed() -> None:
    texts = [str(i) for i in range(50)]
    assert not torch.equal(mismatched(texts, seed=0), mismatched(texts, seed=1))


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "a", "b"]])
def test_captions_that_cannot_be_mismatched_are_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="more than half"):
        mismatched(texts)


def test_every_typo_changes_the_word() -> None:
    for change in TYPOS:
        variants = change("Question")
        assert variants
        assert "Question" not in variants
