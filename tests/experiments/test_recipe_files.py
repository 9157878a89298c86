"""The files of examples/configs/uniter: read whole, built at their true size, and good for an update on small databases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.task_databases import SMALL, write_databases

from advvl.experiments.config import Layer, build, read_yaml
from advvl.experiments.database_options import ModelOptions
from advvl.experiments.train import train
from advvl.experiments.train_options import TrainOptions
from advvl.experiments.train_setup import method_of, model_of
from advvl.models.uniter.checkpoint import load_checkpoint
from advvl.recipes.villa_uniter import villa_uniter
from advvl.runtime.descriptions import described

FOLDER = Path(__file__).parents[2] / "examples" / "configs" / "uniter"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

PARAMETERS = {
    ("pretraining", "base"): 112_938_887,
    ("pretraining", "large"): 340_524_935,
    ("vcr-pretraining", "base"): 113_002_712,
    ("vcr-pretraining", "large"): 340_610_008,
    ("vqa", "base"): 115_892_281,
    ("vqa", "large"): 344_210_489,
    ("ve", "base"): 111_087_619,
    ("ve", "large"): 337_805_315,
    ("nlvr2", "base"): 115_808_515,
    ("nlvr2", "large"): 346_196_995,
    ("vcr", "base"): 111_149_826,
    ("vcr", "large"): 337_888_258,
    ("retrieval", "base"): 109_901_059,
    ("retrieval", "large"): 335_698_947,
    ("referring", "base"): 109_899_521,
    ("referring, two layers", "base"): 110_491_649,
}
"""Of the published classes, with the types and words that their tasks add; found by running the published code."""


COUNTED: dict[tuple[str, ModelOptions], int] = {}


def parameters_of(options: TrainOptions) -> int:
    """The number of parameters of a model of true size; counted once for recipes that share it."""
    key = options.task, options.model
    if key not in COUNTED:
        with torch.device("meta"):
            COUNTED[key] = sum(one.numel() for one in model_of(options).parameters())
    return COUNTED[key]


def recipe(name: str, **values: Any) -> TrainOptions:
    return build(TrainOptions, read_yaml(FOLDER / f"{name}.yaml"), Layer("the test", values))


def small(name: str, root: Path, **values: Any) -> TrainOptions:
    """A recipe at small sizes, on databases that are written here; what makes it that recipe stays."""
    whole = recipe(name)
    sampling: dict[str, Any] = {"micro_batches": 2}
    if whole.sampling.batch_size is not None:
        sampling["batch_size"] = 2
    if whole.sampling.tokens is not None:
        sampling |= {"tokens": 300, "filling": "full"}  # twelve examples do not fill a published budget
    if whole.task == "hard-retrieval":
        sampling |= {"candidates": 4, "hardest": 2}
    options = recipe(
        name,
        start=None,
        data_dir=str(root),
        output=str(root / "out"),
        device="cpu",
        model=SMALL,
        sampling=sampling,
        optimizer={"updates": 1, "warmup": 0},
        adversary={"start": 0},
        **values,
    )
    write_databases(options, root)
    return options


def test_every_released_configuration_has_a_file() -> None:
    released = [f"{task}-{size}" for task in ("vqa", "nlvr2", "ve", "vcr") for size in ("base", "large")]
    assert {f"{kind}-{name}" for kind in ("uniter", "villa") for name in released} <= set(FILES)
    assert {f"{kind}-pretrain-{name}" for kind in ("uniter", "villa") for name in ("all-base", "all-large")} <= set(
        FILES
    )
    assert all((FOLDER / f"{name}.yaml").read_text().startswith("# ") for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_and_its_model_has_the_published_number_of_parameters(name: str) -> None:
    options = recipe(name)
    kind = options.task.removeprefix("hard-") + ", two layers" * (options.model.head_layers == 2)
    assert parameters_of(options) == PARAMETERS[kind, options.model.size]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("villa")])
def test_villas_files_describe_its_released_adversary(name: str) -> None:
    options = recipe(name)
    assert options.adversarial
    if options.task in ("vqa", "ve", "nlvr2", "vcr") and not name.endswith("best"):
        released = villa_uniter(options.task, options.model.size)  # type: ignore[arg-type]
        assert described(method_of(options)) == described(released)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("uniter")])
def test_uniters_files_are_standard(name: str) -> None:
    assert method_of(recipe(name)) is None


@pytest.mark.parametrize("name", FILES)
def test_an_update_moves_the_model_and_leaves_files_that_can_be_read(name: str, tmp_path: Path) -> None:
    options = small(name, tmp_path)
    train(options, progress=False)
    before, after = model_of(options), model_of(options)
    load_checkpoint(after, tmp_path / "out" / "model.safetensors")
    moved = [
        one for (one, old), new in zip(before.named_parameters(), after.parameters(), strict=True) if not old.equal(new)
    ]
    assert any(name.startswith("uniter.encoder") for name in moved)
    scores = json.loads((tmp_path / "out" / "training-scores.json").read_text())
    assert list(scores) == ["1"]
    assert all(0 <= value <= 1 for key, value in scores["1"].items() if not key.endswith("loss"))
