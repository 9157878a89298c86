"""Small databases of every task's examples, and the shards of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.image_db import RegionLimits, open_images
from advvl.data.uniter.text_db import open_texts
from support.uniter_databases import META, arrays, published_images, published_texts

LIMITS = RegionLimits(num_bb=12)
IMAGES = {f"i{n}.npz": arrays(2 + n % 5, features=6, seed=n) for n in range(9)}
WORDS = {f"t{n}": [6 + (7 * n + k) % 90 for k in range(1 + n % 6)] for n in range(14)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def captions() -> dict[str, Any]:
    """Captions t0 … t13 of the images i0 … i8: those of i0 … i4 have two."""
    return {
        key: {"input_ids": ids, "img_fname": f"i{n % 9}.npz", "target": {"labels": [n % 3], "scores": [1.0]}}
        for n, (key, ids) in enumerate(WORDS.items())
    }


def shard(
    folder: Path, records: dict[str, Any] | None = None, images: dict[str, Any] | None = None, **meta: Any
) -> Shard:
    texts = published_texts(folder / "x.db", captions() if records is None else records, {**META, **meta})
    published_images(folder, "feat_numbb12", IMAGES if images is None else images, compressed=False)
    return Shard(open_texts(texts), open_images(folder, LIMITS))


def vcr_records(*, known: bool = True) -> dict[str, Any]:
    choices = {"input_ids_as": [[6], [7, 8], [9], [10]], "input_ids_rs": [[11, 12], [13], [14], [15] * 5]}
    return {
        f"q{n}": {
            "input_ids": [20 + n, 21],
            **choices,
            "qa_target": n if known else -1,
            "qar_target": 3 if known else -1,
            "img_fname": ["i0.npz", f"i{n + 1}.npz"],
        }
        for n in range(3)
    }


def vcr_shard(folder: Path, lengths: Any, records: dict[str, Any] | None = None, *, known: bool = True) -> Shard:
    made = shard(folder, vcr_records(known=known) if records is None else records)
    longest = {"qa": {}, "qar": {"q0": 2 + 1 + 5, "q2": 2 + 1 + 5}}[lengths]
    usual = dict.fromkeys(made.texts.lengths, {"qa": 2 + 2, "qar": 2 + 2 + 5}[lengths])
    (folder / "x.db" / f"id2len_{lengths}.json").write_text(json.dumps(usual | (longest if known else {})))
    return Shard(open_texts(folder / "x.db", lengths=lengths), made.images, made.images)


def pair_records() -> dict[str, Any]:
    return {
        key: {"input_ids": ids, "img_fname": [f"i{n % 9}.npz", f"i{(n + 4) % 9}.npz"], "target": n % 2}
        for n, (key, ids) in enumerate(WORDS.items())
    }


def referring_records() -> dict[str, Any]:
    return {
        str(n): {"input_ids": [6 + n], "image_id": n, "ann_id": 10 * n + 1, "bbox": [1, 2, 3, 4.5]} for n in range(9)
    }


def referring_shard(folder: Path, records: dict[str, Any] | None = None, tables: Any = None) -> Shard:
    made = shard(folder, referring_records() if records is None else records)
    rows = [
        {"id": n, "width": 64, "height": 48, "ann_ids": [10 * n + k for k in range(len(one["norm_bb"]))]}
        for n, one in enumerate(IMAGES.values())
    ]
    (folder / "x.db" / "images.json").write_text(json.dumps(rows if tables is None else tables))
    return made
