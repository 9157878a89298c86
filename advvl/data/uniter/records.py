"""Records of UNITER's databases as bytes: texts as msgpack within lz4 frames, arrays as msgpack or as npz.

Arrays inside msgpack are encoded like those of the package msgpack-numpy. The package is not used to read them, because
it unpickles arrays of objects, and a pickle may run code. Sizes are checked before memory is allocated.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from advvl.checks import shown
from advvl.errors import DataError, missing_extra

try:
    import lz4.frame
    import msgpack
except ImportError as error:
    raise missing_extra(str(error.name), "uniter") from error

LARGEST_TEXT: Final = 1 << 22
"""Bytes of a text's record, uncompressed: hundreds of times one of VCR's, which are the longest."""

LARGEST_IMAGE: Final = 1 << 26
"""Bytes of an image's record, uncompressed: dozens of times one of 100 regions."""

_NUMBERS: Final = {
    f"{order}{kind}{size}": np.dtype(f"{order}{kind}{size}")
    for order in "<>|="
    for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items()
    for size in sizes
}
"""The types of arrays that are read, by their encoded names."""
_MOST_ENTRIES: Final = 4096  # of a list or map in an image's record: arrays are bytes

_HEAD: Final = 1024  # bytes, in which a record says how large its first array is
_BAD_ZIP: Final = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)

Arrays = Mapping[str, NDArray[Any]]


def pack_text(record: Mapping[str, Any]) -> bytes:
    """Encode a text's record: plain values by name.

    Raises:
        DataError: a value that msgpack does not take.
    """
    try:
        return bytes(lz4.frame.compress(msgpack.packb(dict(record), use_bin_type=True)))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"expected a record of plain values, got {error}; convert them") from error


def unpack_text(value: bytes | memoryview) -> dict[str, Any]:
    """Decode a text's record.

    Raises:
        DataError: bytes that are none, or unpack to more than `LARGEST_TEXT`.
    """
    try:
        size = lz4.frame.get_frame_info(value)["content_size"]
        if size > LARGEST_TEXT:
            raise DataError(f"expected a record of at most {LARGEST_TEXT} bytes, got {size}; is it a text's?")
        if size:
            packed = lz4.frame.decompress(value)
        else:
            stream = lz4.frame.LZ4FrameDecompressor()
            packed = stream.decompress(value, max_length=LARGEST_TEXT)
            if not stream.eof:
                raise DataError(f"expected a whole record of at most {LARGEST_TEXT} bytes, got another; copy it again")
        record = msgpack.unpackb(packed, raw=False)
    except (RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"expected msgpack in an lz4 frame, got {error or type(error).__name__}; copy it again"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"expected a map from names to values, got {shown(record)}; is it a database of texts?")
    return record


def pack_arrays(arrays: Arrays) -> bytes:
    """Encode an image's arrays as msgpack, uncompressed."""
    return bytes(
        msgpack.packb(
            {
                name: {
                    b"nd": True,
                    b"type": array.dtype.str,
                    b"kind": b"",
                    b"shape": array.shape,
                    b"data": array.tobytes(),
                }
                for name, array in arrays.items()
            },
            use_bin_type=True,
        )
    )


def unpack_arrays(value: bytes | memoryview, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Decode the arrays of these names, those that the record has; they are views of bytes, and not to be written to.

    Raises:
        DataError: bytes that are none of an image's record; an array of anything but numbers, or of another size than its
            bytes.
    """
    try:
        record = msgpack.unpackb(
            value,
            raw=False,
            max_bin_len=LARGEST_IMAGE,
            max_array_len=_MOST_ENTRIES,
            max_map_len=_MOST_ENTRIES,
        )
    except (ValueError, MemoryError) as error:
        raise DataError(
            f"expected arrays in msgpack, got {error or type(error).__name__}; is it compressed?"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"expected a map from names to arrays, got {shown(record)}; is it a database of images?")
    return {name: _array(name, record[name]) for name in names if name in record}


def _array(name: str, entry: Any) -> NDArray[Any]:
    kind, shape, data = (entry.get(key) if isinstance(entry, dict) else None for key in (b"type", b"shape", b"data"))
    if not isinstance(kind, str) or kind not in _NUMBERS or not isinstance(data, bytes):
        raise DataError(f"{name}: expected an array of numbers, got {shown(entry)}; write it again")
    return _numbers(name, _NUMBERS[kind], _shape(name, shape), data)


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    """The shape of an array, from whatever stands for it."""
    sides = shape if isinstance(shape, list | tuple) else [shape]
    if any(type(side) is not int or not 0 <= side <= LARGEST_IMAGE for side in sides):
        raise DataError(f"{name}: expected an array's shape, got {shown(shape)}; write it again")
    return tuple(sides)


def _numbers(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: bytes | memoryview) -> NDArray[Any]:
    if math.prod(shape) * dtype.itemsize != len(data):
        raise DataError(
            f"{name}: expected the bytes of {shape} numbers of {dtype}, got {len(data)} bytes; copy it again"
        )
    array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape)
    return array


def packed_rows(value: bytes | memoryview) -> int:
    """Return the number of rows of `features`, with which published records begin, from the beginning of a record.

    Raises:
        DataError: as `unpack_arrays`.
    """
    head = msgpack.Unpacker(raw=False)
    head.feed(value[:_HEAD])
    try:
        head.read_map_header()
        if head.unpack() == "features":
            for _ in range(head.read_map_header()):
                key = head.unpack()
                if key == b"shape":
                    return _shape("features", head.unpack())[0]
                head.skip()
    except (ValueError, TypeError, LookupError, msgpack.OutOfData):
        pass  # in another order, or damaged, which is reported below
    return _rows(unpack_arrays(value, ("features",)))


def npz_rows(value: bytes | memoryview) -> int:
    """Return the number of rows of `features` of a compressed npz, of which nothing but a header is unpacked.

    Raises:
        DataError: as `unpack_npz`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(value)) as archive, archive.open("features.npy") as member:
            return _header("features", member)[0][0]
    except (*_BAD_ZIP, LookupError):
        return _rows(unpack_npz(value, ("features",)))


def _rows(arrays: Arrays) -> int:
    features = arrays.get("features")
    if features is None or not features.ndim:
        raise DataError("expected an array of features, got none; write it again")
    return len(features)


def pack_npz(arrays: Arrays) -> bytes:
    """Encode an image's arrays as the bytes of a compressed npz file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **dict(arrays))  # type: ignore[arg-type]
    return stream.getvalue()


def unpack_npz(value: bytes | memoryview | IO[bytes], names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Decode the arrays of these names from a compressed npz or an open file of one, those that it has.

    Raises:
        DataError: as `unpack_arrays`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(value) if isinstance(value, bytes | memoryview) else value) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            sizes = sum(members[name].file_size for name in names if name in members)
            if sizes > LARGEST_IMAGE:
                raise DataError(
                    f"expected at most {LARGEST_IMAGE} bytes of arrays, got {sizes}; is it an image's record?"
                )
            return {name: unpack_npy(name, archive.read(members[name])) for name in names if name in members}
    except DataError:
        raise
    except _BAD_ZIP as error:
        raise DataError(
            f"expected arrays as a compressed npz, got {error}; is it uncompressed, or cut short?"
        ) from error


def unpack_npy(name: str, content: bytes) -> NDArray[Any]:
    """Decode a numpy file, whose header may ask for anything.

    Raises:
        DataError: as `unpack_arrays`.
    """
    stream = io.BytesIO(content)
    shape, columns_first, dtype = _header(name, stream)
    if dtype.str not in _NUMBERS:
        raise DataError(f"{name}: expected an array of numbers, got one of {dtype}; write it again")
    array = _numbers(
        name, dtype, tuple(reversed(shape)) if columns_first else shape, memoryview(content)[stream.tell() :]
    )
    return array.T if columns_first else array


def _header(name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a numpy file's header: the array's shape, whether columns come first, and its type."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    except (ValueError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError) as error:
        raise DataError(f"{name}: expected a numpy array, got {error}; write it again") from error
    return _shape(name, shape), columns_first, dtype
