"""Checks of values that a person gives; each raises ConfigurationError: expected, got, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, get_args

from advvl.errors import ConfigurationError


def is_number(value: object) -> bool:
    """Whether a setting is a number, which text, a tensor, None and a bool are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_each(options: object, names: tuple[str, ...], good: Callable[[Any], bool], wanted: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not good(value):
            raise ConfigurationError(f"expected {name} to be {wanted}, got {value!r}")


def at_least(least: int, options: object, *names: str) -> None:
    """Each of these functions raises `ConfigurationError` unless the named options are what its name says."""
    check_each(
        options,
        names,
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"a whole number of {least} or more",
    )


def positive(options: object, *names: str) -> None:
    check_each(options, names, lambda value: 0 < value < math.inf, "a finite number above 0")


def positive_or_infinite(options: object, *names: str) -> None:
    check_each(options, names, lambda value: value > 0, "a number above 0, or math.inf (.inf in YAML) for no limit")


def not_negative(options: object, *names: str) -> None:
    check_each(options, names, lambda value: 0 <= value < math.inf, "a finite number of 0 or more")


def fraction(options: object, *names: str) -> None:
    check_each(options, names, lambda value: 0 <= value < 1, "a number in [0, 1)")


def choice(options: object, name: str, literal: Any) -> None:
    check_each(options, (name,), lambda value: value in get_args(literal), f"one of {', '.join(get_args(literal))}")


def choices(options: object, name: str, literal: Any) -> None:
    check_each(
        options,
        (name,),
        lambda values: len(values) > 0 and len(set(values)) == len(values) and set(values) <= set(get_args(literal)),
        f"one or more of {', '.join(get_args(literal))}, each once",
    )
