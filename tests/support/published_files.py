"""The figures of the released configurations of UNITER and VILLA, by the names of their files.

Read in the repositories ChenRocks/UNITER (config/*.json) and zhegan27/VILLA (config/*.json, reproducibility-vqa/hps.json,
and the number of GPUs of that run in log.txt).
"""

from __future__ import annotations

from typing import Any

RUN = {"output_dir": "/storage/run", "optim": "adamw", "betas": [0.9, 0.98], "dropout": 0.1, "weight_decay": 0.01}
MACHINE = {"fp16": True, "n_workers": 4, "pin_mem": True}
REGIONS = {"conf_th": 0.2, "max_bb": 100, "min_bb": 10, "num_bb": 36}
USUAL: dict[str, Any] = {**RUN, **MACHINE, **REGIONS, "max_txt_len": 60, "grad_norm": 2.0, "seed": 42}


def schedule(rate: float, updates: int, warmup: int, every: int | None = 500) -> dict[str, Any]:
    scored = {} if every is None else {"valid_steps": every}
    return {"learning_rate": rate, "num_train_steps": updates, "warmup_steps": warmup, **scored}


def batches(size: int, accumulated: int, val: int | None = None) -> dict[str, Any]:
    return {
        "train_batch_size": size,
        "val_batch_size": size if val is None else val,
        "gradient_accumulation_steps": accumulated,
    }


def start(size: str, checkpoint: str) -> dict[str, Any]:
    return {"model_config": f"/src/config/uniter-{size}.json", "checkpoint": f"/pretrain/{checkpoint}.pt"}


def villa(modalities: list[str], step: float, weight: float) -> dict[str, Any]:
    return {
        "adv_training": True,
        "adv_modality": modalities,
        "adv_lr_txt": step,
        "adv_lr_img": step,
        "adv_steps": 3,
        "norm_type": "l2",
        "adv_max_norm": 0,
        "adv_kl_weight": weight,
    }


def corpus(
    name: str, texts: list[str], images: list[str], ratios: list[int] | None, tasks: list[str]
) -> dict[str, Any]:
    return {
        "name": name,
        "db": [f"/txt/{text}.db/" for text in texts],
        "img": [f"/img/{image}/" for image in images],
        "tasks": tasks,
        **({} if ratios is None else {"mix_ratio": ratios}),
    }


MIXED = ["itm", "mlm", "mrfr", "mrckl"]
TRAIN = {
    "coco": (["pretrain_coco_train", "pretrain_coco_restval"], ["coco_train2014", "coco_val2014"]),
    "vg": (["pretrain_vg_train"], ["vg"]),
    "cc": (["conceptual_caption_train"], ["gcc_train"]),
    "sbu": (["sbu_caption_train"], ["sbu"]),
}
VAL = {
    "coco": (["pretrain_coco_val"], ["coco_val2014"]),
    "vg": (["pretrain_vg_val"], ["vg"]),
    "cc": (["conceptual_caption_val"], ["gcc_val"]),
    "sbu": (["sbu_caption_val"], ["sbu"]),
}


def mixture(ratios: dict[str, list[int]]) -> dict[str, Any]:
    return {
        "train_datasets": [corpus(name, *TRAIN[name], mix, MIXED) for name, mix in ratios.items()],
        "val_datasets": [corpus(name, *VAL[name], None, MIXED) for name in ratios],
    }


PRETRAINING = {**USUAL, "grad_norm": 5.0, "mrm_prob": 0.15, "itm_neg_prob": 0.5, "itm_ot_lambda": 0.1}
ALL = mixture({"coco": [6, 8, 4, 4], "vg": [9, 12, 6, 6], "cc": [9, 12, 6, 6], "sbu": [6, 8, 4, 4]})


def second_stage(size: str, words: int) -> dict[str, Any]:
    tasks = ["mlm", "mrfr", "mrckl"]
    found = {
        f"{part}_datasets": [corpus("vcr", [f"vcr_{part}"], [f"vcr_gt_{part}/;/img/vcr_{part}"], ratios, tasks)]
        for part, ratios in (("train", [words, 1, 1]), ("val", None))
    }
    more = {"max_txt_len": 220, "grad_norm": -1, "mrm_prob": 0.15, "rank": 0}
    return {
        **USUAL,
        **more,
        **found,
        **start(size, f"uniter-{size}"),
        **batches(6144, 4, 8000),
        **schedule(3e-5, 45000, 4500, 2000),
    }


VQA = {
    **USUAL,
    "train_txt_dbs": ["/txt/vqa_train.db", "/txt/vqa_trainval.db", "/txt/vqa_vg.db"],
    "train_img_dbs": ["/img/coco_train2014/", "/img/coco_val2014", "/img/vg/"],
    "val_txt_db": "/txt/vqa_devval.db",
    "val_img_db": "/img/coco_val2014/",
    "lr_mul": 10.0,
}
VQA_SIZES = {
    "base": {**batches(5120, 5, 10240), **schedule(8e-5, 6000, 600)},
    "large": {**batches(3072, 4, 10240), **schedule(5e-5, 5000, 500)},
}
VE = {
    **USUAL,
    **{
        f"{part}_txt_db": f"/txt/ve_{split}.db/"
        for part, split in (("train", "train"), ("val", "dev"), ("test", "test"))
    },
    **{f"{part}_img_db": "/img/flickr30k/" for part in ("train", "val", "test")},
    "compressed_db": False,
    "pin_mem": False,
}
VE_SIZES = {
    "base": {**batches(4096, 4), **schedule(8e-5, 4000, 400)},
    "large": {**batches(4096, 2), **schedule(3e-5, 4000, 400)},
}
NLVR2 = {
    **USUAL,
    **{
        f"{part}_txt_db": f"/txt/nlvr2_{name}.db"
        for part, name in (("train", "train"), ("val", "dev"), ("test", "test1"))
    },
    **{
        f"{part}_img_db": f"/img/nlvr2_{name}/" for part, name in (("train", "train"), ("val", "dev"), ("test", "test"))
    },
    "model": "paired-attn",
    "use_img_type": True,
}
NLVR2_SIZES = {
    "base": {**batches(10240, 1), **schedule(3e-5, 8000, 800), "seed": 77},
    "large": {**batches(5120, 2), **schedule(2e-5, 5000, 500), "seed": 24},
}
VCR = {
    **USUAL,
    "train_txt_dbs": ["/txt/vcr_train.db/"],
    "train_img_dbs": ["/img/vcr_gt_train/;/img/vcr_train/"],
    "val_txt_db": "/txt/vcr_val.db/",
    "val_img_db": "/img/vcr_gt_val/;/img/vcr_val/",
    "checkpoint_from": "vcr_pretrain",
    "max_txt_len": 220,
    "lr_mul": 1.0,
}
VCR_UPDATES = {**batches(4000, 5, 10), **schedule(6e-5, 8000, 800, 1000)}
RETRIEVAL = {**USUAL, "compressed_db": False, "margin": 0.2, "full_val": True}
HARD = {**RETRIEVAL, "train_batch_size": 8, "negative_size": 399, "hard_neg_size": 31, "inf_minibatch_size": 400}
COCO = {
    "train_txt_dbs": ["/txt/itm_coco_train.db", "/txt/itm_coco_restval.db"],
    "train_img_dbs": ["/img/coco_train2014/", "/img/coco_val2014"],
    **{f"{part}_txt_db": f"/txt/itm_coco_{part}.db" for part in ("val", "test")},
    **{f"{part}_img_db": "/img/coco_val2014/" for part in ("val", "test")},
}
FLICKR = {
    "train_txt_dbs": ["/txt/itm_flickr30k_train.db"],
    "train_img_dbs": ["/img/flickr30k/"],
    **{f"{part}_txt_db": f"/txt/itm_flickr30k_{part}.db" for part in ("val", "test")},
    **{f"{part}_img_db": "/img/flickr30k/" for part in ("val", "test")},
}


def referring(name: str, folder: str = "", **more: Any) -> dict[str, Any]:
    return {
        **RUN,
        **MACHINE,
        "train_txt_db": f"/txt/{folder}{name}_train.db",
        "train_img_db": f"/img/{folder}re_coco_gt",
        "val_txt_db": f"/txt/{folder}{name}_val.db",
        "val_img_db": f"/img/{folder}re_coco_det/",
        "compressed_db": False,
        **start("base", "uniter-base"),
        "max_txt_len": 60,
        "conf_th": -1,
        "num_bb": 100,
        **batches(128, 1),
        **schedule(1e-4, 24000, 1500, None),
        "lr_mul": 1.0,
        "grad_norm": 2.0,
        "decay": "linear",
        "seed": 24,
        **more,
    }


BEST = {
    **VQA,
    **VQA_SIZES["large"],
    **batches(2048, 3, 10240),
    **schedule(5e-5, 7000, 700),
    **villa(["image", "text"], 2e-3, 1.0),
    "train_txt_db": ":".join(f"/data/TXT_DB_lmdb/vqa_{name}_large-cased.db/" for name in ("train", "trainval", "vg")),
    "train_img_dir": ":".join(
        f"/data/IMG_DB/coco_test2015/{name}/" for name in ("coco_train2014", "coco_val2014", "vg")
    ),
    "val_txt_db": "/data/TXT_DB_lmdb/vqa_devval_large-cased.db/",
    "val_img_dir": "/data/IMG_DB/coco_test2015/coco_val2014/",
    "test_txt_db": "/db/vqa_test_large-cased.db",
    "test_img_dir": "/img/coco_test2015/",
    "model_config": "/data/bert-large-cased.tar.gz",
    "checkpoint": "/pretrain/philly_output/adv_large/freelb-kl_from_final_50k/ckpt/model_step_50000.pt",
    "img_format": "lmdb-compress",
    "ans2label": "/data/TXT_DB_lmdb/ans2label.pkl",
    "mcan": False,
    "cut_bert": -1,
    "conf_th": 0.075,
    "decay": "linear",
    "decay_int": 2000,
    "warm_int": 2000,
    "decay_st": 20000,
    "decay_rate": 0.2,
    "adv_init_mag": 0,
    "rank": 0,
}
"""`hps.json`, whose lists of databases are texts joined by a colon."""
for _name in ("train_txt_dbs", "train_img_dbs", "val_img_db"):
    del BEST[_name]

TEXT = villa(["text"], 1e-3, 1.5)
BOTH = ["image", "text"]

PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrain-alldata-base-8gpu": {
        **PRETRAINING,
        **ALL,
        **start("base", "uniter-base-init"),
        **batches(10240, 6),
        **schedule(5e-5, 200000, 10000, 5000),
    },
    "pretrain-alldata-large-16gpu": {
        **PRETRAINING,
        **ALL,
        **start("large", "uniter-large-init"),
        **batches(6144, 4),
        **schedule(5e-5, 500000, 10000, 10000),
        "rank": 0,
    },
    "pretrain-indomain-base-8gpu": {
        **PRETRAINING,
        **mixture({"coco": [2, 2, 1, 1], "vg": [2, 2, 1, 1]}),
        **start("base", "uniter-base-init"),
        **batches(10240, 2),
        **schedule(5e-5, 200000, 10000, 5000),
    },
    "pretrain-vcr-base-4gpu": second_stage("base", 2),
    "pretrain-vcr-large-4gpu": second_stage("large", 10),
    "train-vqa-base-4gpu": {**VQA, **VQA_SIZES["base"], **start("base", "uniter-base")},
    "train-vqa-large-8gpu": {**VQA, **VQA_SIZES["large"], **start("large", "uniter-large")},
    "train-ve-base-2gpu": {**VE, **VE_SIZES["base"], **start("base", "uniter-base")},
    "train-ve-large-4gpu": {**VE, **VE_SIZES["large"], **start("large", "uniter-large")},
    "train-nlvr2-base-1gpu": {**NLVR2, **NLVR2_SIZES["base"], **start("base", "uniter-base")},
    "train-nlvr2-large-2gpu": {**NLVR2, **NLVR2_SIZES["large"], **start("large", "uniter-large")},
    "train-vcr-base-4gpu": {**VCR, **VCR_UPDATES, **start("base", "uniter-base-vcr_2nd_stage")},
    "train-vcr-large-4gpu": {**VCR, **VCR_UPDATES, **start("large", "uniter-large-vcr_2nd_stage")},
    "train-itm-flickr-base-8gpu": {
        **RETRIEVAL,
        **FLICKR,
        **start("base", "uniter-base"),
        **schedule(5e-5, 20000, 2000, 2000),
        "train_batch_size": 40,
        "gradient_accumulation_steps": 4,
        "negative_size": 1,
        "inf_minibatch_size": 40,
    },
    "train-itm-coco-base-16gpu-hn": {**HARD, **COCO, **start("base", "uniter-base"), **schedule(5e-5, 5000, 500)},
    "train-itm-coco-large-16gpu-hn": {
        **HARD,
        **COCO,
        **start("large", "uniter-large"),
        **schedule(3e-5, 5000, 500),
        "full_val": False,
    },
    "train-itm-flickr-base-16gpu-hn": {**HARD, **FLICKR, **start("base", "uniter-base"), **schedule(5e-5, 5000, 500)},
    "train-itm-flickr-large-16gpu-hn": {**HARD, **FLICKR, **start("large", "uniter-base"), **schedule(5e-5, 5000, 500)},
    "train-refcoco-base-1gpu": referring("refcoco"),
    "train-refcocog-base-1gpu": referring("refcocog"),
    "train-refcoco+-base-1gpu": referring(
        "refcoco+", "re/", **schedule(6e-5, 10000, 1000, None), mlp=2, mask_dir="/pretrain/lottery/mask_6.pt"
    ),
    "train-vqa-base-4gpu-adv": {**VQA, **VQA_SIZES["base"], **start("base", "villa-base"), **TEXT},
    "train-vqa-large-8gpu-adv": {
        **VQA,
        **VQA_SIZES["large"],
        **start("large", "villa-large"),
        **villa(["text"], 2e-3, 1.0),
    },
    "train-ve-base-2gpu-adv": {**VE, **VE_SIZES["base"], **start("base", "villa-base"), **TEXT},
    "train-ve-large-4gpu-adv": {**VE, **VE_SIZES["large"], **start("large", "villa-large"), **TEXT},
    "train-nlvr2-base-1gpu-adv": {**NLVR2, **NLVR2_SIZES["base"], **start("base", "villa-base"), **TEXT},
    "train-nlvr2-large-2gpu-adv": {**NLVR2, **NLVR2_SIZES["large"], **start("large", "villa-large"), **TEXT},
    "train-vcr-base-4gpu-adv": {
        **VCR,
        **VCR_UPDATES,
        **start("base", "villa-base-vcr-2nd-stage"),
        **villa(BOTH, 1e-2, 1.5),
    },
    "train-vcr-large-4gpu-adv": {
        **VCR,
        **batches(2000, 10, 10),
        **schedule(6e-5, 10000, 1000, 1000),
        **start("large", "villa-large-vcr-2nd-stage"),
        **villa(BOTH, 1e-1, 1.0),
        "seed": 88,
    },
    "hps": BEST,
}
"""The released files, without `.json`, and what they say; of folders of a run's results nothing but that there is one."""
