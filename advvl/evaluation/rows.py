"""Rows of a batch: the batch of some examples alone, where every field is known to have an entry for each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from advvl.errors import DataError


def take_rows(batch: Mapping[str, Any], rows: Tensor, *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Take some rows of a batch, for `robustness_curve(…, rows=take_rows)`: of every tensor, list and tuple in it.

    A tensor has a row for each example, a list or tuple an entry; mappings are gone through. Anything else, such as a text,
    belongs to all examples and stays.

    Arguments:
        rows: `(n,)`, whole numbers.
        whole: names of fields that belong to all examples, such as `position_ids (1, L)`; they stay. Fields of mappings are
            named with dots, as in `"text.position_ids"`.

    Raises:
        DataError: fields with different numbers of rows; a tensor without axes; in `whole`, a name that no field has.
    """
    unknown = sorted(set(whole) - set(_names(batch)))
    if unknown:
        raise DataError(
            f"expected whole to name fields of the batch, got {unknown}; the batch has {list(_names(batch))}"
        )
    sizes = dict(_sizes(batch, whole))
    if len(set(sizes.values())) > 1 or -1 in sizes.values():
        raise DataError(
            f"expected a row for each example in every field, got {sizes}; "
            "name those of all: partial(take_rows, whole=(…))"
        )
    return {name: _taken(value, rows, whole, name) for name, value in batch.items()}


def _taken(value: Any, rows: Tensor, whole: Collection[str], path: str) -> Any:
    if path in whole:
        return value
    if isinstance(value, Tensor):
        return value[rows.to(value.device)]
    if isinstance(value, Mapping):
        return {name: _taken(item, rows, whole, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        taken = [value[row] for row in rows.tolist()]
        return taken if isinstance(value, list) else tuple(taken)
    return value


def _names(batch: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in batch.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def _sizes(batch: Mapping[str, Any], whole: Collection[str], prefix: str = "") -> Iterator[tuple[str, int]]:
    """The number of rows of each field, by its name; -1 for a tensor without axes."""
    for name, value in batch.items():
        if f"{prefix}{name}" in whole:
            continue
        if isinstance(value, Mapping):
            yield from _sizes(value, whole, f"{prefix}{name}.")
        elif isinstance(value, Tensor | list | tuple):
            yield f"{prefix}{name}", -1 if isinstance(value, Tensor) and not value.ndim else len(value)
