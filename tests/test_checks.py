"""Checks of options: what each takes, and that everything else is refused in the same words, whatever its type."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from advvl import checks
from advvl.errors import ConfigurationError

Kind = Literal["a", "b"]
NO_NUMBERS = ["3", None, True, [1.0], torch.tensor(1.0), math.nan]

CASES: dict[str, tuple[Callable[[Any], None], list[Any], list[Any], str]] = {
    "at_least": (
        lambda o: checks.at_least(2, o, "x"),
        [2, 10**9],
        [1, 2.0, -math.inf, *NO_NUMBERS],
        "a whole number of 2 or more",
    ),
    "positive": (
        lambda o: checks.positive(o, "x"),
        [1, 1e-300, np.float64(2)],
        [0, -1, math.inf, *NO_NUMBERS],
        "a finite number above 0",
    ),
    "positive_or_infinite": (
        lambda o: checks.positive_or_infinite(o, "x"),
        [1, math.inf],
        [0, -math.inf, *NO_NUMBERS],
        "a number above 0, or math.inf",
    ),
    "not_negative": (
        lambda o: checks.not_negative(o, "x"),
        [0, 0.0, 3],
        [-1e-9, math.inf, *NO_NUMBERS],
        "a finite number of 0 or more",
    ),
    "fraction": (lambda o: checks.fraction(o, "x"), [0, 0.5], [1, -0.1, *NO_NUMBERS], r"a number in \[0, 1\)"),
    "fractions": (
        lambda o: checks.fractions(2, o, "x"),
        [(0, 0.5), [0.1, 0.2]],
        [(0.1,), (0.1, 1.0), ("0", 0.1), (False, 0.1), "01", 3],
        r"2 numbers in \[0, 1\)",
    ),
    "increasing": (
        lambda o: checks.increasing(o, "x"),
        [(), (1,), [0.5, 1]],
        [(1, 0.5), (1, 1), (0, 1), (1, math.inf), ("1",), "1", 1, None],
        "finite numbers above 0, each larger",
    ),
    "flag": (lambda o: checks.flag(o, "x"), [True, False], [0, 1, "no", None], "True or False"),
    "text": (lambda o: checks.text(o, "x"), ["a"], ["", None, 3], "a text that is not empty"),
    "instance": (
        lambda o: checks.instance((int, type(None)), o, "x"),
        [3, None],
        ["3", 1.5, [None]],
        "of type int or None",
    ),
    "choice": (lambda o: checks.choice(o, "x", Kind), ["a", "b"], ["c", "", None, 1, ["a"], {"a"}], "one of a, b"),
    "choices": (
        lambda o: checks.choices(o, "x", Kind),
        [("a",), ["b", "a"]],
        [(), ("a", "a"), ("c",), "a", None, 3, [["a"]]],
        "one or more of a, b, each once",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_good_values_pass_and_all_others_are_refused_in_the_same_words(name: str) -> None:
    check, good, bad, wanted = CASES[name]
    for value in good:
        check(SimpleNamespace(x=value))
    for value in bad:
        with pytest.raises(ConfigurationError, match=f"^expected x to be {wanted}.*, got "):
            check(SimpleNamespace(x=value))


# those that the others are made of, and those that tests/test_fuzz.py tries by every entry point
ELSEWHERE = {"is_number", "is_whole", "is_choice", "are_increasing", "path_of", "shown"}
ELSEWHERE |= {"check_each", "check_functions", "check_seed"}


def test_every_check_is_tried() -> None:
    functions = {
        name for name, value in vars(checks).items() if callable(value) and value.__module__ == checks.__name__
    }
    assert {name for name in functions if not name.startswith("_")} - ELSEWHERE == set(CASES)


def test_of_several_names_the_one_that_is_wrong_is_named() -> None:
    with pytest.raises(ConfigurationError, match="expected steps to be a whole number of 1 or more, got 0"):
        checks.at_least(1, SimpleNamespace(epochs=3, steps=0), "epochs", "steps")


def test_values_that_only_behave_like_numbers_are_not_numbers() -> None:
    assert all(map(checks.is_number, (0, 1.5, math.nan, -math.inf, np.float32(1), np.int64(1))))
    assert not any(map(checks.is_number, (True, "1", None, torch.tensor(1.0), 1j, Fraction(8, 255), 10**400)))
    assert all(map(checks.is_whole, (0, -3)))
    assert not any(map(checks.is_whole, (True, 1.0, "1")))


def test_a_message_shows_a_part_of_what_is_large() -> None:
    nested: list[object] = ["x"] * 10
    for _ in range(20):
        nested = [nested] * 10  # 10**21 texts in print, a few lists in memory
    for value in (nested, 10**5000, "x" * 10**6, {1: nested}, [10**5000]):
        assert 0 < len(checks.shown(value)) < 400
    assert checks.shown("3") == "'3'"
    assert checks.shown([0.5, None]) == "[0.5, None]"
    with pytest.raises(ConfigurationError, match=r"expected x to be True or False, got \[\[\[\.\.\.\], "):
        checks.flag(SimpleNamespace(x=nested), "x")
