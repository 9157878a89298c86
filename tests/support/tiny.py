"""The smallest experiment, for the tests of the experiment and of the example."""

from __future__ import annotations

from pathlib import Path

from advvl.experiments.config import Layer, build
from advvl.experiments.uniter import UniterOptions

VALUES = {
    "methods": ["standard", "equal-compute", "freelb", "villa", "pre-training", "both-stages"],
    "threads": 1,
    "jobs": 1,
    "device": "cpu",
    "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "data": {
        "train_images": 40,
        "train_questions": 48,
        "validation_questions": 12,
        "test_questions": 24,
        "captions": 64,
    },
    "pretrain": {"epochs": 2, "batch_size": 16},
    "finetune": {"epochs": 2, "batch_size": 16},
    "villa": {"steps": 2},
    "evaluation": {
        "radii": [0.5, 1.0],
        "steps": 2,
        "step_fraction": 0.5,
        "restarts": 1,
        "examples": 12,
        "batch_size": 8,
    },
}


def tiny(output: Path, **changes: object) -> UniterOptions:
    return build(UniterOptions, Layer("tiny", VALUES), Layer("test", {"output": str(output), **changes}))
