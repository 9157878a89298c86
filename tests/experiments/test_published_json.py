"""Configurations in UNITER's and VILLA's JSON become options of `advvl train`."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from advvl.errors import ConfigurationError
from advvl.experiments.config import build
from advvl.experiments.published_json import read_configuration
from advvl.experiments.train_options import TrainOptions

VQA: dict[str, Any] = {
    "train_txt_dbs": ["/db/vqa_train.db", "/db/vqa_vg.db"],
    "train_img_dbs": ["/img/coco_train2014", "/img/vg"],
    "val_txt_db": "/db/vqa_devval.db",
    "val_img_db": "/img/coco_val2014",
    "checkpoint": "/pretrain/uniter-base.pt",
    "model_config": "/src/config/uniter-base.json",
    "max_txt_len": 60,
    "conf_th": 0.2,
    "max_bb": 100,
    "min_bb": 10,
    "num_bb": 36,
    "train_batch_size": 5120,
    "gradient_accumulation_steps": 5,
    "learning_rate": 8e-5,
    "lr_mul": 10.0,
    "valid_steps": 500,
    "num_train_steps": 6000,
    "warmup_steps": 600,
    "betas": [0.9, 0.98],
    "dropout": 0.1,
    "weight_decay": 0.01,
    "grad_norm": 2.0,
    "seed": 42,
    "fp16": True,
    "n_workers": 4,
}
VILLA = {
    "adv_training": True,
    "adv_modality": ["text"],
    "adv_lr_txt": 1e-3,
    "adv_lr_img": 0,
    "adv_steps": 3,
    "adv_kl_weight": 1.5,
    "norm_type": "l2",
    "adv_max_norm": 0,
}
OFF = {"adv_training": False, "adv_modality": ["text"], "adv_lr_txt": 0, "adv_lr_img": 0, "adv_steps": 1}
TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "vqa": ({}, "vqa"),
    "ve": ({"train_txt_db": "/db/ve_train.db", "train_img_db": "/img/flickr30k"}, "ve"),
    "nlvr2": (
        {"train_txt_db": "/db/nlvr2_train.db", "train_img_db": "/img/nlvr2_train", "model": "paired-attn"},
        "nlvr2",
    ),
    "vcr": (
        {"train_txt_dbs": ["/db/vcr_train.db"], "train_img_dbs": ["/img/vcr_gt_train;/img/vcr_train"]},
        "vcr",
    ),
    "retrieval": ({"train_txt_dbs": ["/db/itm_flickr30k_train.db"], "negative_size": 1}, "retrieval"),
    "hard-retrieval": (
        {"train_txt_dbs": ["/db/itm_flickr30k_train.db"], "train_batch_size": 8, "hard_neg_size": 31},
        "hard-retrieval",
    ),
    "referring": ({"train_txt_db": "/db/refcoco_train.db", "train_loss": "cls", "mlp": 1}, "referring"),
}


def written(folder: Path, name: str = "train-4gpu.json", without: tuple[str, ...] = (), **changes: Any) -> str:
    found = {key: value for key, value in VQA.items() if key not in without} | changes
    (folder / name).write_text(json.dumps(found), encoding="utf-8")
    return str(folder / name)


def options(path: str) -> TrainOptions:
    return build(TrainOptions, read_configuration(path))


def test_a_standard_configuration_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = options(written(tmp_path))
    assert (found.task, found.seed, found.start) == ("vqa", 42, "pretrained/uniter-base.pt")
    assert found.data.train_texts == ("txt_db/vqa_train.db", "txt_db/vqa_vg.db")
    assert found.data.train_images == ("img_db/coco_train2014", "img_db/vg")
    assert (found.sampling.tokens, found.sampling.micro_batches, found.sampling.filling) == (5120, 20, "uniter")
    assert (found.optimizer.updates, found.optimizer.head_rate, found.optimizer.summed) == (6000, 10.0, 5)
    assert not found.adversarial
    said = capsys.readouterr().err
    assert "4 GPUs" in said
    assert "left to the command line: fp16 (see --precision), n_workers (see --workers)" in said
    assert "without a meaning here" not in said


def test_an_adversary_is_read(tmp_path: Path) -> None:
    found = options(written(tmp_path, **VILLA)).adversary
    assert (found.modalities, found.text_step, found.steps, found.kl_weight) == (("text",), 1e-3, 3, 1.5)
    assert (found.norm, found.max_norm, found.order) == ("l2", math.inf, "together")
    both = VILLA | {"adv_modality": ["text", "image", "alter"], "adv_lr_img": 2e-3, "adv_max_norm": 0.5}
    found = options(written(tmp_path, **both)).adversary
    assert (found.modalities, found.order, found.image_step, found.max_norm) == (
        ("text", "image"),
        "in turn",
        2e-3,
        0.5,
    )


def test_an_adversary_that_is_off_is_none_whatever_its_values(tmp_path: Path) -> None:
    assert not options(written(tmp_path, **OFF)).adversarial


@pytest.mark.parametrize("name", TASKS)
def test_the_databases_tell_the_task(name: str, tmp_path: Path) -> None:
    changes, task = TASKS[name]
    without = () if name == "vqa" else ("train_txt_dbs", "train_img_dbs")
    images = {} if name in ("vqa", "vcr") else {"train_img_db": "/img/flickr30k"}
    found = options(written(tmp_path, without=without, **(images | changes)))
    assert found.task == task


def test_vcr_has_two_folders_of_images_four_rows_and_half_the_penalty(tmp_path: Path) -> None:
    found = options(written(tmp_path, **TASKS["vcr"][0], **VILLA))
    assert found.data.train_images == ("img_db/vcr_train",)
    assert found.data.train_drawn == ("img_db/vcr_gt_train",)
    assert found.sampling.tokens == 4 * 5120
    assert found.adversary.kl_weight == 0.75


def test_pretraining_is_a_mixture(tmp_path: Path) -> None:
    corpora = [
        {
            "name": "coco",
            "db": ["/db/pretrain_coco.db"],
            "img": ["/img/coco_train2014"],
            "tasks": ["itm", "mlm", "mrfr", "mrckl"],
            "mix_ratio": [6, 8, 4, 4],
        },
        {"name": "vg", "db": ["/db/pretrain_vg.db"], "img": ["/img/vg"], "tasks": ["mlm"], "mix_ratio": [12]},
    ]
    without = tuple(key for key in VQA if key.startswith(("train_txt", "train_img", "val_")))
    found = options(written(tmp_path, without=without, train_datasets=corpora, grad_norm=-1))
    assert found.task == "pretraining"
    assert found.mixture.mlm == (8, 12)
    assert found.mixture.itm == (6, 0)
    assert found.mixture.mrc_kl == (4, 0)
    assert found.optimizer.clip == math.inf


VALUES = (None, True, 3, -1, 0.5, "x", "", [], [3], {}, {"a": 1}, [["a"]], [None], math.nan)


@pytest.mark.parametrize("key", [*VQA, *VILLA, "train_datasets", "val_datasets", "task", "model", "num_answers", "mlp"])
def test_a_value_of_another_kind_is_taken_or_refused_in_words(key: str, tmp_path: Path) -> None:
    for value in VALUES:
        with suppress(ConfigurationError):  # any other error fails
            options(written(tmp_path, **VILLA | {key: value}))


@pytest.mark.parametrize(
    "spoilt",
    [{"db": "x"}, {"img": [3]}, {"tasks": 3}, {"tasks": ["mlm"], "mix_ratio": []}, {"mix_ratio": ["1"]}],
    ids=str,
)
def test_a_corpus_that_is_none_is_refused_in_words(spoilt: dict[str, Any], tmp_path: Path) -> None:
    corpus = {"name": "vg", "db": ["/db/vg.db"], "img": ["/img/vg"], "tasks": ["mlm"], "mix_ratio": [1], **spoilt}
    with pytest.raises(ConfigurationError, match="expected train_datasets with lists db, img, tasks"):
        options(written(tmp_path, train_datasets=[corpus]))


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "JSON"), ("[]", "JSON object"), ("{}", "add a key task"), ('{"a": 1, "a": 2}', "more than once")],
)
def test_a_file_that_is_none_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigurationError, match=said):
        read_configuration(str(tmp_path / "c.json"))
    with pytest.raises(ConfigurationError, match=r"gone\.json"):
        read_configuration(str(tmp_path / "gone.json"))
