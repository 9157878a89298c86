"""UNITER's databases, written and read byte for byte as the published code does it, with public packages alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import msgpack_numpy
import numpy as np
from numpy.typing import NDArray

META = {"CLS": 1, "SEP": 2, "MASK": 3, "UNK": 5, "v_range": [6, 97], "bert": "tiny-cased"}

Arrays = dict[str, NDArray[Any]]


def published_texts(folder: Path, records: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any] = META) -> Path:
    """Write a database of texts."""
    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for key, record in records.items():
            packed = msgpack.packb(dict(record), use_bin_type=True)
            transaction.put(key.encode("utf-8"), lz4.frame.compress(packed))
    environment.close()
    files = {
        "meta": meta,
        "id2len": {key: len(record["input_ids"]) for key, record in records.items()},
        "txt2img": {key: record["img_fname"] for key, record in records.items() if "img_fname" in record},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read_published_texts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of a database of texts, and its JSON files by name."""
    environment = lmdb.open(str(folder), readonly=True, create=False)
    with environment.begin(buffers=True) as transaction:
        records = {
            bytes(key).decode("utf-8"): msgpack.unpackb(lz4.frame.decompress(value), raw=False)
            for key, value in transaction.cursor()
        }
    environment.close()
    return records, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def published_images(
    folder: Path, name: str, images: Mapping[str, Arrays], *, compressed: bool, counts: str | None = None
) -> Path:
    """Write the database `name` of images into `folder`, and the file `counts` of how many regions they have."""
    (folder / name).mkdir(parents=True)
    environment = lmdb.open(str(folder / name), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for key, arrays in images.items():
            if compressed:
                stream = io.BytesIO()
                np.savez_compressed(stream, **arrays)
                value = stream.getvalue()
            else:
                value = msgpack.packb(arrays, default=msgpack_numpy.encode, use_bin_type=True)
            transaction.put(key.encode("utf-8"), value)
        transaction.put(b"__keys__", json.dumps(list(images)).encode("utf-8"))
    environment.close()
    if counts is not None:
        found = {key: len(arrays["norm_bb"]) for key, arrays in images.items()}
        (folder / counts).write_text(json.dumps(found))
    return folder


def read_published_images(folder: Path, *, compressed: bool) -> dict[str, Any]:
    """The arrays of all images of a database, and under `__keys__` the list of their names."""
    environment = lmdb.open(str(folder), readonly=True, create=False)
    found: dict[str, Any] = {}
    with environment.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            name = bytes(key).decode("utf-8")
            if name == "__keys__":
                found[name] = json.loads(bytes(value).decode("utf-8"))
            elif compressed:
                with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
                    found[name] = dict(arrays)
            else:
                found[name] = msgpack.unpackb(value, object_hook=msgpack_numpy.decode, raw=False)
    environment.close()
    return found


def arrays(count: int, *, features: int = 5, classes: int = 4, seed: int = 0, dtype: str = "f2") -> Arrays:
    """An image's arrays as a detector gives them, the surest region first."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4)
    sizes = corners[:, 2:] - corners[:, :2]
    labels = rng.dirichlet(np.ones(classes), count)
    return {
        "features": rng.standard_normal((count, features)).astype(dtype),
        "norm_bb": np.concatenate([corners, sizes], 1).astype(dtype),
        "conf": np.sort(0.25 + 0.75 * rng.random((count, 1)), axis=0)[::-1].astype(dtype),
        "soft_labels": labels.astype(dtype),
    }
