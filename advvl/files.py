"""Files that are whole or absent, and directories that know which configuration they belong to.

A file is written beside its final name, flushed to the disk and renamed over it, so that a process killed at any moment
leaves the old file, the new file, or no file, never half of one. What it leaves besides is a temporary whose name says
so; `remove_temporaries`, which `OutputDirectory.claim` calls, removes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from advvl.errors import CheckpointError

_TEMPORARY_PREFIX: Final = ".advvl-"
_TEMPORARY_SUFFIX: Final = ".partial"

# What PyTorch and its restricted unpickler raise on a file that is cut short, damaged, or holds more than data.
_UNREADABLE: Final = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a stream whose content is at `path` once the block ends, whole or not at all; for content too large to hold.

    Missing parent directories are made. Errors of the block or the file system pass through, and leave nothing behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        dir=target.parent, prefix=f"{_TEMPORARY_PREFIX}{target.name}-", suffix=_TEMPORARY_SUFFIX
    )
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_file_creation_mask())
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _flush_directory(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a reader finds the old content or the new, never a part; see `replacing`."""
    with replacing(path) as stream:
        stream.write(data)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: object) -> Path:
    """Write `value` as JSON, whole or not at all; numbers that JSON cannot hold (NaN, infinity) raise `ValueError`."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors in the safetensors format, whole or not at all."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, safetensors_bytes(dense, metadata=dict(metadata or {})))


def write_torch(path: str | os.PathLike[str], value: object) -> Path:
    """Write tensors and plain containers as a PyTorch file, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return write_bytes(path, buffer.getvalue())


def read_torch(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> Any:
    """Read what `write_torch` wrote, running no code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, or holds anything but tensors and plain containers.
    """
    try:
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
        CheckpointError: it is not one.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"expected JSON at {str(path)!r}, got {error}; remove the file to have it written again"
        ) from error


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits that identify a configuration, whatever the order of its keys."""
    canonical = json.dumps(configuration, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The keys, dotted, whose values differ, each with both values."""
    theirs, ours = _flatten(found), _flatten(json.loads(json.dumps(expected, default=str)))
    absent = object()
    keys = [*ours, *(key for key in theirs if key not in ours)]
    parts = [
        f"{key} ({_shown(theirs, key)} there, {_shown(ours, key)} here)"
        for key in keys
        if theirs.get(key, absent) != ours.get(key, absent)
    ]
    return ", ".join(parts) or "its fingerprint alone (it was made by another version)"


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


def remove_temporaries(directory: Path) -> None:
    """Remove what writers that were killed left in `directory`, which must have no writer now."""
    for leftover in directory.rglob(f"{_TEMPORARY_PREFIX}*{_TEMPORARY_SUFFIX}"):
        with suppress(FileNotFoundError):
            leftover.unlink()


def _file_creation_mask() -> int:
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
