"""Checks of values that users pass; each raises `ConfigurationError`: expected, got.

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size")
        positive(self, "learning_rate")
        choice(self, "schedule", Schedule)

A value of a wrong type is refused with the same message as a value out of range: text and bools are not numbers.
Messages show a value by `shown`, however large it is.
"""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import Any, get_args

from advvl.errors import ConfigurationError


def is_number(value: object) -> bool:
    """Return True for a real number that a tensor can be multiplied by, including NaN and infinities.

    Text, tensors, None, bools, fractions, and whole numbers beyond the range of a float do not count.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return not isinstance(value, Rational) or (isinstance(value, Integral) and abs(int(value)) <= sys.float_info.max)


def shown(value: object) -> str:
    """Return a value as messages show it: its repr, with long texts, long numbers and nested lists shortened."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # of a whole number with thousands of digits
        return f"a value of type {type(value).__name__} too long to show"


def is_whole(value: object) -> bool:
    """Return True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_each(options: object, names: Sequence[str], good: Callable[[Any], bool], wanted: str) -> None:
    """Check that the named attributes of `options` are `good`; all other checks here use this one.

    Arguments:
        options: a dataclass, or any object with attributes of these names.
        good: judges a value; it gets values of any type.
        wanted: what a good value is, in words for the message.

    Raises:
        ConfigurationError: a value that is not good; the message has its name and `wanted`.
    """
    for name in names:
        value = getattr(options, name)
        if not good(value):
            raise ConfigurationError(f"expected {name} to be {wanted}, got {shown(value)}")


def at_least(least: int, options: object, *names: str) -> None:
    """Check that the named options are ints of at least `least`."""
    check_each(options, names, lambda value: is_whole(value) and value >= least, f"a whole number of {least} or more")


def positive(options: object, *names: str) -> None:
    """Check that the named options are numbers in (0, ∞)."""
    check_each(options, names, lambda value: is_number(value) and 0 < value < math.inf, "a finite number above 0")


def positive_or_infinite(options: object, *names: str) -> None:
    """Check that the named options are numbers in (0, ∞]."""
    wanted = "a number above 0, or math.inf (.inf in YAML) for no limit"
    check_each(options, names, lambda value: is_number(value) and value > 0, wanted)


def not_negative(options: object, *names: str) -> None:
    """Check that the named options are numbers in [0, ∞)."""
    check_each(options, names, lambda value: is_number(value) and 0 <= value < math.inf, "a finite number of 0 or more")


def fraction(options: object, *names: str) -> None:
    """Check that the named options are numbers in [0, 1)."""
    check_each(options, names, _is_fraction, "a number in [0, 1)")


def fractions(count: int, options: object, *names: str) -> None:
    """Check that the named options are lists or tuples of `count` numbers in [0, 1)."""
    check_each(
        options,
        names,
        lambda values: isinstance(values, list | tuple) and len(values) == count and all(map(_is_fraction, values)),
        f"{count} numbers in [0, 1)",
    )


def increasing(options: object, *names: str) -> None:
    """Check that the named options are lists or tuples of numbers in (0, ∞), each above the one before."""
    check_each(options, names, are_increasing, "finite numbers above 0, each larger than the one before")


def are_increasing(values: Any) -> bool:
    """Return True for a list or tuple of numbers in (0, ∞), each above the one before."""
    return (
        isinstance(values, list | tuple)
        and all(is_number(value) and 0 < value < math.inf for value in values)
        and list(values) == sorted(set(values))
    )


def flag(options: object, *names: str) -> None:
    """Check that the named options are bools."""
    check_each(options, names, lambda value: isinstance(value, bool), "True or False")


def text(options: object, *names: str) -> None:
    """Check that the named options are non-empty texts."""
    check_each(options, names, lambda value: isinstance(value, str) and value != "", "a text that is not empty")


def instance(kind: type | tuple[type, ...], options: object, *names: str) -> None:
    """Check that the named options are instances of a class, or of one of several."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join("None" if one is type(None) else one.__name__ for one in kinds)
    check_each(options, names, lambda value: isinstance(value, kinds), f"of type {wanted}")


def choice(options: object, name: str, literal: Any) -> None:
    """Check that an option is one of the texts of a `Literal`."""
    known = get_args(literal)
    check_each(options, (name,), lambda value: value in known, f"one of {', '.join(known)}")


def choices(options: object, name: str, literal: Any) -> None:
    """Check that an option is a list or tuple of some texts of a `Literal`, at least one, none twice."""
    known = get_args(literal)
    check_each(
        options,
        (name,),
        lambda values: (
            isinstance(values, list | tuple)
            and 0 < len(values) == len({*map(repr, values)})
            and all(value in known for value in values)
        ),
        f"one or more of {', '.join(known)}, each once",
    )


def is_choice(value: object, known: Sequence[object]) -> bool:
    """Return True for one of some texts; False for arrays, whose comparison is not a bool."""
    return isinstance(value, str) and value in known


def check_functions(**given: object) -> None:
    """Check that each value, named as the caller named it, is a function or None.

    Raises:
        ConfigurationError: one is neither.
    """
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ConfigurationError(f"expected {name} as a function, or None, got {shown(value)}")


def path_of(value: object) -> Path:
    """Return a path that was given as a text or as a path.

    Raises:
        ConfigurationError: anything else, or a text that no file system accepts.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigurationError(f"expected a path, got {shown(value)}")
    return Path(text)


def check_seed(seed: object) -> None:
    """Raise ConfigurationError unless the value is an integer that a torch generator accepts as seed."""
    if not is_whole(seed) or not -(2**63) <= seed < 2**64:  # type: ignore[operator]
        raise ConfigurationError(f"expected seed to be a whole number below 2**64, got {shown(seed)}")


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


def _is_fraction(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1
