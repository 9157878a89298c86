"""Reading UNITER's databases from a warm cache, on one core: texts, and images in both encodings.

Ours, which checks every record, against the plain loop of the published readers, which checks nothing; and, of images,
against a bare copy of the records' bytes. Features and boxes are read, as fine-tuning does, and the soft labels lie in the
records beside them.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import msgpack_numpy
import numpy as np
import pytest
import torch
from races import Entry, Pace, Race, recorded

from advvl.data.uniter.image_db import RegionLimits, open_images, write_images
from advvl.data.uniter.text_db import TextMeta, open_texts, write_texts

pytestmark = pytest.mark.benchmark(timer=recorded)

TEXTS, IMAGES, REGIONS, FEATURES, CLASSES = 5000, 120, 36, 2048, 1601
LIMITS = RegionLimits(num_bb=REGIONS)
CASES = ["texts", "images, uncompressed", "images, compressed"]
LANES = ["ours", "plain loop", "copy of the bytes"]


class Bench:
    """A database, and the ways to read all of it."""

    def __init__(self, case: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="advvl-bench-"))
        self.compressed = case.endswith(", compressed")
        rng = np.random.default_rng(0)
        if case == "texts":
            self.names = [f"question-{n}" for n in range(TEXTS)]
            with write_texts(self.folder / "x.db", TextMeta(101, 102, 103, (106, 28996))) as texts:
                for n, name in enumerate(self.names):
                    ids = rng.integers(106, 28996, 6 + n % 18).tolist()
                    target = {"labels": [n % 3129, 3], "scores": [0.9, 0.3]}
                    texts.add(name, {"input_ids": ids, "img_fname": f"{n}.npz", "target": target, "id": n})
            self.place = self.folder / "x.db"
            return
        self.names = [f"image-{n}.npz" for n in range(IMAGES)]
        with write_images(self.folder, LIMITS, compressed=self.compressed) as images:
            for name in self.names:
                corners = np.sort(rng.random((REGIONS, 2, 2)), axis=1).reshape(REGIONS, 4)
                features = np.maximum(rng.standard_normal((REGIONS, FEATURES)), 0)  # of a ReLU: half are zero
                labels = rng.dirichlet(np.full(CLASSES, 0.01), REGIONS)
                images.add(name, features, corners, scores=rng.random(REGIONS), labels=labels)
        self.place = self.folder / f"feat_numbb{REGIONS}{'_compressed' if self.compressed else ''}"

    def ours(self) -> Entry:
        found: list[Any] = []
        if self.place.suffix == ".db":
            texts = open_texts(self.place)

            def call() -> None:
                found[:] = [texts[name] for name in self.names]
        else:
            images = open_images(self.folder, LIMITS, compressed=self.compressed)

            def call() -> None:
                found[:] = [images.read(name).features for name in self.names]

        return self.entry(call, found, "ours")

    def plain(self) -> Entry:
        """The published reader, in a copy of the database: a process opens a path once."""
        copy = self.folder / "copy"
        shutil.copytree(self.place, copy)
        transaction = lmdb.open(str(copy), readonly=True, create=False, lock=False).begin(buffers=True)
        found: list[Any] = []

        def text(value: Any) -> Any:
            return msgpack.unpackb(lz4.frame.decompress(value), raw=False)

        def image(value: Any) -> Any:
            if self.compressed:
                with np.load(io.BytesIO(value)) as arrays:
                    record = {name: arrays[name] for name in ("features", "norm_bb")}
            else:
                record = msgpack.unpackb(value, object_hook=msgpack_numpy.decode, raw=False)
            boxes = torch.tensor(record["norm_bb"]).float()
            torch.cat([boxes, boxes[:, 4:5] * boxes[:, 5:]], -1)
            return torch.tensor(record["features"]).float()

        read = text if self.place.suffix == ".db" else image

        def call() -> None:
            found[:] = [read(transaction.get(name.encode())) for name in self.names]

        return self.entry(call, found, "peer")

    def copy(self) -> Entry:
        copy = self.folder / "bytes"
        shutil.copytree(self.place, copy)
        transaction = lmdb.open(str(copy), readonly=True, create=False, lock=False).begin(buffers=True)
        found: list[Any] = []

        def call() -> None:
            found[:] = [bytes(transaction.get(name.encode())) for name in self.names]

        return self.entry(call, found, "limit")

    def entry(self, call: Callable[[], None], found: list[Any], role: Any) -> Entry:
        call()
        kept = list(found)
        if role != "limit":
            first = kept[0]
            self.first = first if not hasattr(self, "first") else self.first
            same = torch.equal(first, self.first) if isinstance(first, torch.Tensor) else first == self.first
            assert same, "expected ours to read what the plain loop reads"

        def check() -> None:
            assert len(found) == len(self.names)

        return Entry(call, check, role, {"records": len(self.names)}, repeats=len(self.names))


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("case", CASES)
def test_reading(race: Race, case: str, name: str) -> None:
    def build() -> dict[str, Callable[[], Entry]]:
        bench = Bench(case)
        makers = {"ours": bench.ours, "plain loop": bench.plain, "copy of the bytes": bench.copy}
        return {lane: partial(make) for lane, make in makers.items()}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lane = race("data", case, name, build, Pace(budget=6.0, least=5, most=40))
    finally:
        torch.set_num_threads(threads)
    if lane.seconds:
        race.benchmark.extra_info["per_second"] = round(1 / lane.median)
