"""Reads the answer to a question, and the truth of a caption, off a drawn picture: by its words, not by the library."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NTH = ["first", "second", "third"]


def digit(word: str) -> int:
    return WORDS.index(word) if word in WORDS else WORDS.index(re.sub(r"(?<=x)es$|s$", "", word))


def read(picture: str) -> np.ndarray:
    """The digits of the drawn grid, -1 where it is empty."""
    return np.array([[-1 if mark == "·" else int(mark) for mark in line.split()] for line in picture.split("\n")])


def answer(picture: str, text: str) -> str:
    """What a reader of the drawn picture would answer."""
    grid = read(picture)
    held = grid[grid >= 0]

    def line(where: str) -> np.ndarray:
        ordinal, kind = where.split()
        n = NTH.index(ordinal)
        along = grid[n] if kind == "row" else grid[:, n]
        return along[along >= 0]

    def places(word: str) -> np.ndarray:
        return np.argwhere(grid == digit(word))

    if match := re.fullmatch(r"is there an? (\w+)", text):
        return "yes" if digit(match[1]) in held else "no"
    if text == "how many digits are there":
        return str(held.size)
    if match := re.fullmatch(r"how many digits are in the (\w+ \w+)", text):
        return str(line(match[1]).size)
    if match := re.fullmatch(r"how many (odd|even) digits are there", text):
        return str(int(np.sum(held % 2 == (match[1] == "odd"))))
    if match := re.fullmatch(r"how many (\w+) are there", text):
        return str(len(places(match[1])))
    if match := re.fullmatch(r"what digit is at the (\w+) row (\w+) column", text):
        return str(grid[NTH.index(match[1]), NTH.index(match[2])])
    if match := re.fullmatch(r"what is the (largest|smallest) digit(?: in the (\w+ \w+))?", text):
        among = line(match[2]) if match[2] else held
        return str(sorted(among)[-1 if match[1] == "largest" else 0])
    if match := re.fullmatch(r"is there an? (\w+) (left of|right of|above|below) an? (\w+)", text):
        axis = 1 if "of" in match[2] else 0
        here, there = places(match[1])[:, axis], places(match[3])[:, axis]
        low, high = (here.min(), there.max()) if match[2] in ("left of", "above") else (there.min(), here.max())
        return "yes" if low < high else "no"
    if match := re.fullmatch(r"what digit is directly (left of|right of|above|below) the (\w+)", text):
        ((row, col),) = places(match[2])
        cells = {
            "left of": grid[row, :col][::-1],
            "right of": grid[row, col + 1 :],
            "above": grid[:row, col][::-1],
            "below": grid[row + 1 :, col],
        }
        return str(cells[match[1]][0])
    if match := re.fullmatch(r"which (row|column) is the (\w+) in", text):
        ((row, col),) = places(match[2])
        return NTH[row if match[1] == "row" else col]
    if match := re.fullmatch(r"are there more (\w+) than (\w+)", text):
        return "yes" if len(places(match[1])) > len(places(match[2])) else "no"
    raise AssertionError(f"a question nobody can read: {text}")


def holds(picture: str, text: str) -> bool:
    """Whether a reader of the drawn picture would call the caption true."""
    grid = read(picture)
    held = grid[grid >= 0].tolist()
    if match := re.fullmatch(r"(\w+) digits : (.*)", text):
        claimed: Counter[int] = Counter()
        for item in re.split(r" , | and ", match[2]):
            number, name = item.split()
            claimed[digit(name)] += 1 if number in ("a", "an") else WORDS.index(number)
        return claimed == Counter(held) and claimed.total() == WORDS.index(match[1])
    if re.match(r"first (row|column) :", text):
        lines = [re.fullmatch(r"(\w+) (row|column) : (.*)", part) for part in text.split(" ; ")]
        for n, (line, ordinal) in enumerate(zip(lines, NTH, strict=True)):
            assert line is not None
            assert line[1] == ordinal
            along = grid[n] if line[2] == "row" else grid[:, n]
            named = [] if line[3] == "empty" else [WORDS.index(word) for word in line[3].split()]
            if along[along >= 0].tolist() != named:
                return False
        return True
    placed = re.findall(r"an? (\w+) at the (\w+) row (\w+) column", text)
    assert placed, f"a caption nobody can read: {text}"
    return all(grid[NTH.index(row), NTH.index(col)] == digit(word) for word, row, col in placed)
