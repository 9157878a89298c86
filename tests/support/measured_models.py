"""Small trained models of a task with their databases, and the command lines that attack them."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from advvl.evaluation.measurement import Measurement
from advvl.experiments.config import Layer, build
from advvl.experiments.train_options import TrainOptions
from advvl.experiments.train_setup import model_of
from advvl.models.uniter.checkpoint import save_checkpoint
from support.task_databases import values, write_databases

ASKED = ["--attack", "pgd,random", "--radius", "image=L2:1,20", "--radius", "image=L2:1,20+text=Linf/token:0.2,2"]
SHORT = ["--robustness.steps", "3", "--robustness.restarts", "1"]


def configured(task: str, root: Path) -> str:
    """Write the databases of a task, two untrained models, and the file of its options."""
    given = values(task, root, evaluation={"tokens": 60})
    options = build(TrainOptions, Layer("the test", given))
    write_databases(options, root)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = model_of(build(TrainOptions, Layer("the test", {**given, "seed": seed})))
        save_checkpoint(model, root / f"seed{seed}" / "best.safetensors")
    path = root / f"{task}.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def checkpoints(root: Path) -> list[str]:
    return ["--checkpoints", ",".join(str(root / f"seed{seed}" / "best.safetensors") for seed in (0, 1))]


def measured(root: Path, name: str) -> Measurement:
    return Measurement.load(root / "out" / "robustness" / "measurements" / f"{name}.safetensors")


def same(one: Measurement, other: Measurement) -> bool:
    pairs = [(one.clean, other.clean), (one.scores, other.scores), (one.unmoved, other.unmoved)]
    pairs += [(one.norms[name], other.norms[name]) for name in one.norms]
    return all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in pairs) and one.flags == other.flags
