"""Records as bytes, damaged in any way: decoded, or refused in words; never another error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.uniter_databases import arrays

from advvl.data.uniter.records import (
    npz_rows,
    pack_arrays,
    pack_npz,
    pack_text,
    packed_rows,
    unpack_arrays,
    unpack_npz,
    unpack_text,
)
from advvl.errors import DataError

NAMES = ("features", "norm_bb", "conf", "soft_labels")
ONE = arrays(3)
READERS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "text": (pack_text({"input_ids": list(range(6, 30)), "img_fname": "x.npz"}), unpack_text),
    "msgpack": (pack_arrays(ONE), lambda value: unpack_arrays(value, NAMES)),
    "npz": (pack_npz(ONE), lambda value: unpack_npz(value, NAMES)),
    "rows of msgpack": (pack_arrays(ONE), packed_rows),
    "rows of npz": (pack_npz(ONE), npz_rows),
}

CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 4)), min_size=1, max_size=8
)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")  # of numpy, about headers that are no literals
@settings(max_examples=150, deadline=None)
@given(changes=CHANGES)
def test_damage_is_refused_in_words(name: str, changes: list[tuple[float, bytes, int]]) -> None:
    whole, read = READERS[name]
    value = bytearray(whole)
    for place, put, taken in changes:
        start = int(place * len(value))
        value[start : start + taken] = put
    with suppress(DataError):
        read(bytes(value))


@pytest.mark.parametrize("name", READERS)
def test_a_record_cut_anywhere_is_refused(name: str) -> None:
    whole, read = READERS[name]
    read(whole)
    for size in range(0, len(whole), 7 if name.startswith("rows") else 3):
        if name != "rows of msgpack" or size < 30:  # it reads no more than the beginning
            with pytest.raises(DataError):
                read(whole[:size])


def test_a_directory_of_a_zip_that_points_before_the_file_is_refused() -> None:
    value = bytearray(pack_npz(ONE))
    end = value.rindex(b"PK\x05\x06")
    value[end + 16 : end + 20] = (1 << 31).to_bytes(4, "little")  # where the directory is said to begin
    with pytest.raises(DataError, match="expected arrays as a compressed npz"):
        unpack_npz(bytes(value), NAMES)
