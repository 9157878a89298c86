"""Invented statements in the published form of NLVR, whose truth follows from their boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

COLORS = {"black": "Black", "blue": "#0099ff", "yellow": "Yellow"}


def write_corpus(folder: Path, count: int = 48) -> Path:
    """Write `dev.json` and `test.json`: half of the boxes are as the sentence says."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("dev.json", "test.json")):
        generator = torch.Generator().manual_seed(seed)
        lines = [json.dumps(_example(number, generator)) for number in range(count)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _example(number: int, generator: torch.Generator) -> dict[str, Any]:
    color = list(COLORS)[number // 2 % 3]
    shown = color if number % 2 else list(COLORS)[(number // 2 + 1) % 3]
    places = torch.randint(0, 80, (3, 2, 2), generator=generator).tolist()
    boxes = [
        [{"x_loc": x, "y_loc": y, "size": 20, "type": "circle", "color": COLORS[shown]} for x, y in box]
        for box in places
    ]
    return {
        "sentence": f"There is a {color} item.",
        "label": "true" if number % 2 else "false",
        "identifier": f"{number}-0",
        "directory": str(number // 2 % 6),
        "structured_rep": boxes,
    }
