"""Atomic files, locks for their writers, and readers that check before they allocate.

A file is written beside its final name, flushed to the disk and renamed over it, so that a process killed at any moment
leaves the old file, the new file, or no file, never half of one. It may also leave a temporary file, recognisable by
its name; `remove_temporaries` removes those that no process is writing. Locks are the system's (`flock`): a process
that dies releases its own.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from advvl.checks import path_of
from advvl.errors import CheckpointError, OutputDirectoryError
from advvl.runtime.descriptions import differing

LOCK_FILE: Final = ".advvl-lock"
"""The lock file of a directory that only one process at a time may write."""

_PREFIX: Final = ".advvl-"
_PARTIAL: Final = ".partial"
_ESCAPED_HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")
_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

# The errors of PyTorch and its restricted unpickler for a file that is truncated, damaged, or holds more than data.
_UNREADABLE: Final = (
    OSError,
    RuntimeError,
    EOFError,
    MemoryError,
    OverflowError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    SafetensorError,
)


@contextmanager
def writing_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the file system inside this context, at `path` or below, into an `OutputDirectoryError`.

    Raises:
        OutputDirectoryError: no permission, no space, a file instead of a directory.
    """
    target = path_of(path)
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        if (
            named is None
            or named.name.startswith(_PREFIX)
            or target in named.parents
            or named in (target, *target.parents)
        ):
            raise OutputDirectoryError(
                f"expected to write {str(target)!r}, got {error.strerror or error}; make room, change its permissions, or "
                "choose another place"
            ) from error
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a stream whose content appears at `path` when the block ends, or not at all; for content too large for memory.

    Missing parent directories are made. Errors in the block pass through and leave nothing behind.

    Raises:
        OutputDirectoryError: the file system refuses to write it.
    """
    target = path_of(path)
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = _temporary(target)
        try:
            with os.fdopen(descriptor, "wb") as stream:  # open, and so locked, until it has its final name
                yield stream
                stream.flush()
                os.fsync(descriptor)
                os.chmod(name, 0o666 & ~file_creation_mask())
                os.replace(name, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
        _flush_directory(target.parent)


@contextmanager
def only_writer(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file or directory that only one process at a time may write, while the block runs.

    The lock is a file beside it, or in the directory, and is removed at the end. Missing parent directories are made.

    Arguments:
        path: of a file, or of a directory, which need not exist yet.
        wait: wait until another process releases the lock; otherwise that is an error.

    Raises:
        OutputDirectoryError: another process holds the lock; or the lock cannot be written.
    """
    target = path_of(path)
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with writing_to(target):
            for lock in _lock_files(target):
                descriptor = _locked(lock, wait=wait)
                if descriptor is None:
                    raise OutputDirectoryError(
                        f"expected no other process to write {str(target)!r}, got one at work; wait for it, or choose "
                        "another place"
                    )
                held.callback(_unlocked, lock, descriptor)
        yield


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a reader finds the old content or the new, never a part; see `replacing`."""
    with replacing(path) as stream:
        stream.write(data)
    return path_of(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8, atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: object) -> Path:
    """Write `value` as JSON, atomically; numbers that JSON cannot hold (NaN, infinity) raise `ValueError`."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors in the safetensors format, atomically."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, safetensors_bytes(dense, metadata=dict(metadata or {})))


def write_torch(path: str | os.PathLike[str], value: object) -> Path:
    """Write tensors and plain containers as a PyTorch file, atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return write_bytes(path, buffer.getvalue())


def read_torch(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> Any:
    """Read what `write_torch` wrote, running no code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, compressed, or holds anything but tensors and plain containers.
    """
    path = path_of(path)
    try:
        _check_archive(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a file at {str(path)!r}, got none; check the path") from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"expected a whole PyTorch file of tensors and plain containers at {str(path)!r}, got one that gives "
            f"{type(error).__name__}; write it again or remove it"
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON; see `parse_json`.
    """
    path = path_of(path)
    try:
        return parse_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected JSON at {str(path)!r}, got {error}; remove the file to have it written again"
        ) from error


def parse_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file for callers that raise their own errors.

    Raises:
        OSError: it cannot be read.
        ValueError: not UTF-8, not JSON, a duplicate key in an object, or lists nested too deeply for Python.
    """
    try:
        return plain_json(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("lists or objects nested too deep") from error


def plain_json(text: str) -> Any:
    """Decode JSON without duplicate keys.

    Raises:
        ValueError: not JSON, a duplicate key, or half of a character, which no file of UTF-8 can hold.
        RecursionError: lists nested too deeply for Python.
    """
    found = json.loads(text, object_pairs_hook=_each_once)
    if _ESCAPED_HALF.search(text):  # of a whole character, or of none
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, value in pairs:
        if name in entry:
            raise ValueError(f"{name[:80]!r} more than once in an object")
        entry[name] = value
    return entry


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for an archive whose parts would unpack to more than the file has bytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("expected an archive that is not compressed")


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits that identify a configuration, whatever the order of its keys."""
    canonical = json.dumps(configuration, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The dotted keys whose values differ, each with both values."""
    theirs, ours = _flatten(found), _flatten(json.loads(json.dumps(expected, default=str)))
    absent = object()
    keys = [*ours, *(key for key in theirs if key not in ours)]
    parts = [_difference(key, theirs, ours) for key in keys if theirs.get(key, absent) != ours.get(key, absent)]
    return ", ".join(parts) or "its fingerprint alone (it was made by another version)"


def _difference(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """A key that differs, with both values; for the description of an object, the fields that differ."""
    there, here = theirs.get(key), ours.get(key)
    if isinstance(there, str) and isinstance(here, str) and here.endswith(")"):
        return differing(there, here, key)
    return f"{key} ({_shown(theirs, key)} there, {_shown(ours, key)} here)"


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def remove_temporaries(path: Path) -> None:
    """Remove temporaries of killed writers, for a file or below a directory; those being written now are kept.

    Raises:
        OutputDirectoryError: the file system refuses.
    """
    with writing_to(path):
        whole = path.is_dir()
        pattern = f"{_PREFIX}*{_PARTIAL}" if whole else f"{_PREFIX}{glob.escape(path.name)}-*{_PARTIAL}"
        for leftover in path.rglob(pattern) if whole else path.parent.glob(pattern):
            with suppress(FileNotFoundError), open(leftover, "rb") as stream:
                if _lock(stream.fileno(), wait=False):
                    leftover.unlink()


def _temporary(target: Path) -> tuple[int, str]:
    """Open a new temporary beside `target`, locked, so that no process mistakes it for one of a killed writer."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f"{_PREFIX}{target.name}-", suffix=_PARTIAL)
        _lock(descriptor, wait=True)
        if _is_at(descriptor, name):
            return descriptor, name
        os.close(descriptor)  # removed before it was locked


def _lock_files(target: Path) -> Iterator[Path]:
    """The locks of a file or directory, each looked up while the previous one is held.

    A directory that was made under the lock beside it stays locked there, and also inside itself for later writers.
    """
    beside = target.parent / f"{_PREFIX}{target.name}.lock"
    if not target.is_dir() or beside.exists():
        yield beside
    if target.is_dir():
        yield target / LOCK_FILE


def _unlocked(lock: Path, descriptor: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(lock)
    os.close(descriptor)


def _locked(path: Path, *, wait: bool) -> int | None:
    """Open and lock the file at `path`, made if missing; None: another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = False
        try:
            held = _lock(descriptor, wait=wait) and _is_at(descriptor, path)
            if held:
                return descriptor
            if not wait and _is_at(descriptor, path):
                return None
        finally:
            if not held:
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file; False: another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn("this file system has no locks: see to it that one process writes a directory", stacklevel=2)
    return True


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Return True if the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def file_creation_mask() -> int:
    """Return the process's mask of permissions (umask)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_directory(directory: Path) -> None:
    """Make a rename last through a power cut where the platform can open directories."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
