"""Errors that say where in a file, or in which example, they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from advvl.errors import DataError


@contextmanager
def within(where: str) -> Iterator[None]:
    """Prefix the message of a DataError raised within by `where`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
