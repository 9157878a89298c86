"""Small databases for every task of UNITER, under the names that options give them, and the options of a small training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from advvl.data.uniter.datasets.referring import DETECTED, DRAWN
from advvl.data.uniter.image_writer import write_images
from advvl.data.uniter.text_writer import write_texts
from advvl.data.uniter.word_pieces import TextMeta
from advvl.experiments.config import Layer, build
from advvl.experiments.train_options import TrainOptions

META = TextMeta(1, 2, 3, (6, 97), 5, "tiny-cased")
FEATURES, CLASSES, IMAGES = 6, 5, 6
WIDTH, HEIGHT = 64, 48

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 97,
    "img_dim": FEATURES,
    "img_label_dim": CLASSES,
}
"""The sizes of a model for these databases."""


def write_databases(options: TrainOptions, root: Path, *, texts: int = 12) -> None:
    """Write all databases that the options name."""
    data, pictures = options.data, names_of(options.task)
    for part in ("train", "val"):
        folders = (getattr(data, f"{part}_{kind}") for kind in ("texts", "images", "drawn"))
        for name, images, *drawn in zip(*filter(None, folders), strict=True):
            write_pictures(root / images, data.limits, pictures)
            for boxes in drawn:
                write_pictures(root / boxes, type(data.limits)(num_bb=data.drawn_bb), pictures)
            if not (root / name).exists():
                write_records(root / name, options.task, texts)


def names_of(task: str) -> list[str]:
    if task == "referring":
        return [kind.format(number) for kind in (DRAWN, DETECTED) for number in range(IMAGES)]
    return [f"i{number}.npz" for number in range(IMAGES)]


def write_pictures(folder: Path, limits: Any, names: list[str]) -> None:
    if list(folder.glob("feat_*")) and (folder / f"feat_{limits.suffix}").exists():
        return
    rng = np.random.default_rng(0)
    with write_images(folder, limits) as images:
        for number, name in enumerate(names):
            corners = corners_of(number)
            count = len(corners)
            images.add(
                name,
                rng.standard_normal((count, FEATURES)),
                corners,
                scores=np.sort(0.25 + 0.7 * rng.random(count))[::-1].copy(),
                labels=rng.dirichlet(np.ones(CLASSES), count),
            )


def corners_of(number: int) -> Any:
    """The regions of a picture: left, top, right and bottom as shares of its size."""
    count = 2 + number % 3
    return np.sort(np.random.default_rng(number % IMAGES).random((count, 2, 2)), axis=1).reshape(count, 4)


def write_records(folder: Path, task: str, count: int) -> None:
    with write_texts(folder, META) as texts:
        for number in range(count):
            ids = [6 + (7 * number + place) % 90 for place in range(1 + number % 6)]
            key = (
                f"dev-{number // 2}-0-{number % 2}"
                if task == "nlvr2"
                else f"test-{number}"
                if task == "vcr"
                else str(number)
            )
            texts.add(key, {"input_ids": ids, **fields(task, number)})
        if task == "referring":
            size = {"width": WIDTH, "height": HEIGHT}
            boxes = [[10 * image + box for box in range(len(corners_of(image)))] for image in range(IMAGES)]
            rows = [{"id": image, "ann_ids": found, **size} for image, found in enumerate(boxes)]
            texts.add_table("images", rows)


def fields(task: str, number: int) -> dict[str, Any]:
    image = number % IMAGES
    if task == "nlvr2":
        return {"img_fname": [f"i{image}.npz", f"i{(image + 1) % IMAGES}.npz"], "target": number % 2}
    if task.startswith("vcr"):
        return {
            "input_ids_as": [[6, 7], [8], [9, 10 + number], [11]],
            "input_ids_rs": [[12], [13, 14], [15], [16 + number]],
            "qa_target": number % 4,
            "qar_target": (number + 1) % 4,
            "img_fname": [f"i{image}.npz", f"i{(image + 1) % IMAGES}.npz"],
        }
    if task == "referring":
        left, top, right, bottom = (corners_of(image)[1] * [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()
        return {"image_id": image, "ann_id": 10 * image + 1, "bbox": [left, top, right - left, bottom - top]}
    return {"img_fname": f"i{image}.npz", "target": {"labels": [number % 3], "scores": [1.0]}}


MIXTURES = {
    "pretraining": {"mlm": [2], "itm": [2], "mrfr": [1], "mrc": [1], "mrc_kl": [1]},
    "vcr-pretraining": {"mlm": [2], "mrfr": [1], "mrc_kl": [1]},
}


def values(task: str, root: Path, **more: Any) -> dict[str, Any]:
    """Options of a task; those of a section are over the usual ones."""
    drawn = task.startswith("vcr")
    sampling: dict[str, Any] = {"tokens": 250, "micro_batches": 2}
    if task in ("retrieval", "referring"):
        sampling = {"batch_size": 2, "micro_batches": 2}
    if task == "hard-retrieval":
        sampling = {"micro_batches": 4, "candidates": 4, "hardest": 2}
    usual: dict[str, Any] = {
        "task": task,
        "data_dir": str(root),
        "output": str(root / "out"),
        "device": "cpu",
        "model": {**SMALL, "answers": 3},
        "data": {
            **{f"{part}_texts": [f"{part}.db"] for part in ("train", "val")},
            **{f"{part}_images": ["images"] for part in ("train", "val")},
            **({f"{part}_drawn": ["boxes"] for part in ("train", "val")} if drawn else {}),
        },
        "sampling": sampling,
        "optimizer": {"updates": 4, "warmup": 1},
        "evaluation": {"every": 2, "tokens": 100, "images": 4},
        "mixture": MIXTURES.get(task, {}),
    }
    for name, value in more.items():
        usual[name] = {**usual.get(name, {}), **value} if isinstance(value, dict) else value
    return usual


def options_of(task: str, root: Path, **more: Any) -> TrainOptions:
    return build(TrainOptions, Layer("the test", values(task, root, **more)))
