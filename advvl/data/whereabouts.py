"""Errors that say where in a file, or in which example, they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from advvl.errors import DataError


@contextmanager
def within(where: str) -> Iterator[None]:
    """A DataError raised within begins with `where`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
