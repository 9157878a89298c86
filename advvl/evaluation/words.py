"""Changes of words that keep the meaning, searched for the text that a model answers worst, and captions of other examples.

found = changed_words(questions, score, changes=(*TYPOS, synonyms(wordnet("/usr/share/wordnet"))), edits=2)
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from advvl.checks import check_functions, check_seed, is_choice, is_whole, shown
from advvl.errors import ConfigurationError, DataError

Change = Callable[[str], Sequence[str]]
"""From a word to all variants of it."""

TextScore = Callable[[list[str], Tensor], Tensor]
"""From n texts and the examples that they are of `(n,)` to scores in [0, 1] `(n,)`."""

Search = Literal["greedy", "random"]

_ROWS: Final = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_PARTS: Final = ("noun", "verb", "adj", "adv")
_PUNCTUATION: Final = re.compile(r"^[\W_]+|[\W_]+$")  # around a word


def keyboard(word: str) -> list[str]:
    """Replace a letter by one beside it on the keyboard (QWERTY), in each way."""
    return [
        word[:i] + (other.upper() if letter.isupper() else other) + word[i + 1 :]
        for i, letter in enumerate(word)
        for other in _BESIDE.get(letter.lower(), "")
    ]


def swaps(word: str) -> list[str]:
    """Swap two letters in a row, in each way that changes the word."""
    return [
        word[:i] + b + a + word[i + 2 :]
        for i, (a, b) in enumerate(pairwise(word))
        if a != b and a.isalpha() and b.isalpha()
    ]


def case(word: str) -> list[str]:
    """Write a word in lower case, in capitals, and with a capital."""
    return [variant for variant in dict.fromkeys((word.lower(), word.upper(), word.capitalize())) if variant != word]


def spacing(word: str) -> list[str]:
    """Break a word by a space, in each place."""
    return [f"{word[:i]} {word[i:]}" for i in range(1, len(word))]


TYPOS: Final[tuple[Change, ...]] = (keyboard, swaps, case, spacing)
"""The changes that need no list."""


def synonyms(of: Mapping[str, Sequence[str]]) -> Change:
    """Replace a word by any of its synonyms, in capitals or with a capital as the word is; punctuation around it stays.

    Arguments:
        of: a word in lower case to its synonyms, as `wordnet` reads them, or a list of one's own.

    Raises:
        DataError: anything but lists of texts, by words in lower case.
    """
    wrong = [word for word, others in of.items() if not _are_texts(others) or word != word.lower()]
    if wrong:
        raise DataError(f"expected a list of synonyms for each word in lower case, got others for {shown(wrong)}")

    def change(word: str) -> list[str]:
        inner = word if word.lower() in of else _PUNCTUATION.sub("", word)
        return [word.replace(inner, _in_case_of(inner, one), 1) for one in of.get(inner.lower(), ())]

    return change


def wordnet(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read the synonyms of every word from a folder of WordNet's database, those of its most frequent sense first.

    Arguments:
        folder: with the files `index.noun`, `data.noun` and those of verb, adj and adv, as Debian's wordnet-base has them.

    Raises:
        DataError: a file that is missing, or a line that is not of the format.

    Source: the manual page wndb(5WN) of WordNet 3.0.
    """
    found: dict[str, list[str]] = {}
    for part in _PARTS:
        synsets: dict[str, list[str]] = {}
        for number, fields in _lines(Path(folder) / f"data.{part}"):
            try:
                count = int(fields[3], 16)
                words = [fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(count)]
            except (IndexError, ValueError) as error:
                raise _malformed(Path(folder) / f"data.{part}", number) from error
            synsets[fields[0]] = words
        for number, fields in _lines(Path(folder) / f"index.{part}"):
            try:
                offsets = fields[-int(fields[2]) :]
                senses = [synsets[offset] for offset in offsets]
            except (IndexError, ValueError, KeyError) as error:
                raise _malformed(Path(folder) / f"index.{part}", number) from error
            lemma = fields[0].replace("_", " ")
            others = found.setdefault(lemma, [])
            others += [word for sense in senses for word in sense if word.lower() != lemma and word not in others]
    return {word: list(dict.fromkeys(others)) for word, others in found.items() if others}


@dataclass(frozen=True, eq=False)
class ChangedTexts:
    """The worst texts that a search found.

    Arguments:
        texts: one for each example; its own where no change lowered the score.
        scores: `(N,)` fp64, of these texts.
        edits: `(N,)`, how many words of each are changed.
    """

    texts: tuple[str, ...]
    scores: Tensor
    edits: Tensor


def changed_words(
    texts: Sequence[str],
    score: TextScore,
    *,
    changes: Sequence[Change] = TYPOS,
    edits: int = 1,
    tries: int = 20,
    search: Search = "greedy",
    seed: int = 0,
) -> ChangedTexts:
    """Search for the change of each text that lowers its score most; no word is changed twice.

    Greedy search makes one edit at a time and keeps the best of `tries` random ones, if it lowers the score. Random search
    draws `tries` texts with all edits, and keeps the best. Give a score that is not only 0 or 1, such as the probability of
    the right answer, so that greedy search sees which way is down.

    Arguments:
        texts: N of them; words are what spaces separate.
        score: lower is worse for the model; called on the texts as they are, then on all examples' candidates at once.
        changes: each draws its variants of a word; all are drawn from equally often.
        edits: words of a text that may be changed.
        tries: candidates per edit and example (greedy), or per example (random).
        seed: of the draws; the same gives the same texts.

    Raises:
        ConfigurationError: counts below 1, an unknown search, changes that are no functions.
        DataError: no texts, a change that gives no list of texts, or scores that are not finite and one for each text.
    """
    if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"expected a list of one text or more, got {shown(texts)}")
    for name, value in (("edits", edits), ("tries", tries)):
        if not is_whole(value) or value < 1:
            raise ConfigurationError(f"expected {name} to be a whole number of 1 or more, got {shown(value)}")
    if not is_choice(search, get_args(Search)):
        raise ConfigurationError(f"expected search to be one of {get_args(Search)}, got {shown(search)}")
    if not isinstance(changes, list | tuple) or not changes:
        raise ConfigurationError(f"expected a list of one change of words or more, got {shown(changes)}; give TYPOS")
    check_functions(score=score, **{f"change {i}": change for i, change in enumerate(changes)})
    check_seed(seed)
    draws = random.Random(seed)
    best = [_Text(tuple(text.split(" ")), frozenset()) for text in texts]
    lowest = _scored(score, list(texts), list(range(len(texts))))
    rounds, at_once = (edits, 1) if search == "greedy" else (1, edits)
    for _ in range(rounds):
        candidates, rows = [], []
        for row, text in enumerate(best):
            for _ in range(tries):
                candidate = text
                for _ in range(at_once):
                    candidate = _edited(candidate, changes, draws)
                if candidate is not text:
                    candidates.append(candidate)
                    rows.append(row)
        if not candidates:
            break
        for row, candidate, value in zip(
            rows, candidates, _scored(score, [str(one) for one in candidates], rows).tolist(), strict=True
        ):
            if value < lowest[row]:
                best[row], lowest[row] = candidate, value
    return ChangedTexts(tuple(map(str, best)), lowest, torch.tensor([len(text.changed) for text in best]))


def mismatched(texts: Sequence[str], *, seed: int = 0) -> Tensor:
    """Draw for each example another one with another text: rows `(N,)`, a permutation, for `rows.take_rows`.

    Raises:
        DataError: a text that more than half of the examples have, so that some would get their own.
    """
    check_seed(seed)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    first: dict[str, int] = {}
    for place, row in enumerate(order):
        first.setdefault(texts[row], place)
    order.sort(key=lambda row: first[texts[row]])  # equal texts side by side, kinds in random order
    largest = max(Counter(texts).values(), default=0)
    if not texts or 2 * largest > len(texts):
        raise DataError(
            f"expected no text in more than half of {len(texts)} examples, got one in {largest}; add others"
        )
    rows = torch.empty(len(texts), dtype=torch.long)
    for place, row in enumerate(order):
        rows[row] = order[(place + largest) % len(texts)]
    return rows


@dataclass(frozen=True)
class _Text:
    """A text as its words, and the numbers of those that were changed."""

    words: tuple[str, ...]
    changed: frozenset[int]

    def __str__(self) -> str:
        return " ".join(self.words)


def _edited(text: _Text, changes: Sequence[Change], draws: random.Random) -> _Text:
    """Change a word drawn at random among those that are left and have a variant; the same text where there is none."""
    left = [i for i, word in enumerate(text.words) if word and i not in text.changed]
    draws.shuffle(left)
    for i in left:
        found = [change(text.words[i]) for change in changes]
        wrong = [one for one in found if not _are_texts(one)]
        if wrong:
            raise DataError(f"expected a change to give a list of variants, got {shown(wrong[0])}; put them in a list")
        variants = [list(one) for one in found if one]
        if variants:
            word = draws.choice(draws.choice(variants))
            return _Text((*text.words[:i], word, *text.words[i + 1 :]), text.changed | {i})
    return text


def _are_texts(found: object) -> bool:
    """True for a sequence of texts that is not itself one."""
    return isinstance(found, Sequence) and not isinstance(found, str) and all(isinstance(one, str) for one in found)


def _scored(score: TextScore, texts: list[str], rows: list[int]) -> Tensor:
    found = torch.as_tensor(score(texts, torch.tensor(rows))).detach().double().cpu()
    if found.shape != (len(texts),) or not found.isfinite().all():
        raise DataError(
            f"expected a finite score for each of {len(texts)} texts, got {tuple(found.shape)} {shown(found)}"
        )
    return found.clone()


def _in_case_of(word: str, other: str) -> str:
    """Write another word in capitals, or with a capital, where a word is."""
    if len(word) > 1 and word.isupper():
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The fields of each line with its number; lines of the licence begin with a space."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected WordNet's {path.name!r} in {str(path.parent)!r}, got {error}") from error
    lines = enumerate(text.splitlines(), 1)
    return [(number, line.split("|")[0].split()) for number, line in lines if line.strip() and not line.startswith(" ")]


def _malformed(path: Path, number: int) -> DataError:
    return DataError(
        f"expected a line of WordNet's database, got another in {str(path)!r}, line {number}; see wndb(5WN)"
    )


def _beside() -> dict[str, str]:
    """Each letter's neighbours to the left and right, and those above and below it, by the stagger of the rows."""
    found = {}
    for y, row in enumerate(_ROWS):
        for x, letter in enumerate(row):
            near = [(y, x - 1), (y, x + 1), (y - 1, x), (y - 1, x + 1), (y + 1, x - 1), (y + 1, x)]
            found[letter] = "".join(_ROWS[b][a] for b, a in near if 0 <= b < len(_ROWS) and 0 <= a < len(_ROWS[b]))
    return found


_BESIDE: Final = _beside()
