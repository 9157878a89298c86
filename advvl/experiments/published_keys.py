"""The keys of UNITER's and VILLA's own configurations, by what becomes of them here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from advvl.data.masking import MASK_PROBABILITY, NEGATIVE_PROBABILITY

FOLDERS: Final = {"txt": "txt_db", "db": "txt_db", "img": "img_db", "pretrain": "pretrained"}
"""Folders of the published containers, and those under the data directory that stand for them."""

TASKS: Final = {
    "vqa": "vqa",
    "ve": "ve",
    "nlvr2": "nlvr2",
    "vcr": "vcr",
    "itm": "retrieval",
    "refcoco": "referring",
    "refcoco+": "referring",
    "refcocog": "referring",
}
"""Tasks by the first word of the names of their databases."""

SAME: Final[Mapping[str, str]] = {
    "seed": "seed",
    "conf_th": "data.conf_th",
    "max_bb": "data.max_bb",
    "min_bb": "data.min_bb",
    "max_txt_len": "data.max_text",
    "dropout": "model.dropout",
    "num_answers": "model.answers",
    "mlp": "model.head_layers",
    "margin": "model.margin",
    "itm_ot_lambda": "model.ot_weight",
    "learning_rate": "optimizer.learning_rate",
    "num_train_steps": "optimizer.updates",
    "warmup_steps": "optimizer.warmup",
    "weight_decay": "optimizer.weight_decay",
    "betas": "optimizer.betas",
    "lr_mul": "optimizer.head_rate",
    "valid_steps": "evaluation.every",
    "hard_neg_size": "sampling.hardest",
}
"""Published keys whose values mean the same here."""

STEPS: Final = {"text": "adv_lr_txt", "image": "adv_lr_img"}
"""Published keys of an ascent step's length, by modality."""

READ: Final = frozenset(
    {
        *STEPS.values(),
        "adv_steps",
        "norm_type",
        "adv_kl_weight",
        "adv_max_norm",
        "adv_modality",
        "adv_training",
        "checkpoint",
        "grad_norm",
        "gradient_accumulation_steps",
        "negative_size",
        "model",
        "model_config",
        "num_bb",
        "task",
        "train_batch_size",
        "train_datasets",
        "val_datasets",
        "train_loss",
        *(f"{part}_{kind}_db{s}" for part in ("train", "val") for kind in ("txt", "img") for s in ("", "s")),
        "train_img_dir",
        "val_img_dir",
    }
)
"""Published keys that are read in another form."""

MACHINE: Final = {
    "fp16": "--precision",
    "n_workers": "--workers",
    "output_dir": "--output",
    "ans2label": "--data.answers, which takes a JSON file",
}
"""Published keys that are of the authors' machines, and the options to give instead."""

FIXED: Final[Mapping[str, Any]] = {
    "optim": "adamw",
    "decay": "linear",
    "adv_init_mag": 0,
    "itm_neg_prob": NEGATIVE_PROBABILITY,
    "mrm_prob": MASK_PROBABILITY,
    "use_img_type": True,
    "mcan": False,
    "cut_bert": -1,
}
"""Published keys that have one value here, which is that of every released file."""
