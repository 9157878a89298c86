"""The recipes of examples/configs/uniter, and the reader of published JSON, against the figures of the released files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.published_files import PUBLISHED

from advvl.errors import ConfigurationError
from advvl.experiments.config import build, leaves, read_yaml
from advvl.experiments.published_json import read_configuration
from advvl.experiments.published_keys import MACHINE
from advvl.experiments.train_options import AdversaryOptions, TrainOptions

FOLDER = Path(__file__).parents[2] / "examples" / "configs" / "uniter"

FILES = {
    **{
        f"{kind}-{task}-{size}": f"train-{task}-{size}-{gpus}gpu{ending}"
        for task, size, gpus in (
            ("vqa", "base", 4),
            ("vqa", "large", 8),
            ("ve", "base", 2),
            ("ve", "large", 4),
            ("nlvr2", "base", 1),
            ("nlvr2", "large", 2),
            ("vcr", "base", 4),
            ("vcr", "large", 4),
        )
        for kind, ending in (("uniter", ""), ("villa", "-adv"))
    },
    **{
        f"uniter-hard-retrieval-{name}-{size}": f"train-itm-{name}-{size}-16gpu-hn"
        for name in ("coco", "flickr")
        for size in ("base", "large")
    },
    "uniter-retrieval-flickr-base": "train-itm-flickr-base-8gpu",
    "uniter-referring-refcoco-base": "train-refcoco-base-1gpu",
    "uniter-referring-refcocog-base": "train-refcocog-base-1gpu",
    "uniter-referring-refcocoplus-base": "train-refcoco+-base-1gpu",
    "uniter-pretrain-all-base": "pretrain-alldata-base-8gpu",
    "uniter-pretrain-all-large": "pretrain-alldata-large-16gpu",
    "uniter-pretrain-indomain-base": "pretrain-indomain-base-8gpu",
    "uniter-pretrain-vcr-base": "pretrain-vcr-base-4gpu",
    "uniter-pretrain-vcr-large": "pretrain-vcr-large-4gpu",
    "villa-vqa-large-best": "hps",
}
"""The released file of a recipe."""

VQA_DATA = ("train_texts", "train_images", "val_texts", "val_images")
OTHERWISE = {
    # the published name is a slip: the file does not fit the size
    "uniter-hard-retrieval-flickr-large": ("start",),
    # the folder of the authors' machine, which the other two files and the scripts of evaluation do not have
    "uniter-referring-refcocoplus-base": tuple(f"data.{name}" for name in VQA_DATA),
    # the folders of the authors' machine; 16 GPUs are in the run's log
    "villa-vqa-large-best": (*(f"data.{name}" for name in VQA_DATA), "start", "sampling.micro_batches"),
}
"""The options in which a recipe is meant to differ from its file."""

DERIVED = {
    "uniter-retrieval-flickr-large": ("uniter-retrieval-flickr-base", ("start", "model.size")),
    "villa-pretrain-all-base": ("uniter-pretrain-all-base", ("adversary",)),
    "villa-pretrain-all-large": ("uniter-pretrain-all-large", ("adversary",)),
    "villa-pretrain-indomain-base": ("uniter-pretrain-indomain-base", ("adversary",)),
    "villa-retrieval-flickr-base": (
        "uniter-retrieval-flickr-base",
        ("adversary", "start", "evaluation.published_recall"),
    ),
    "villa-referring-refcoco-base": ("uniter-referring-refcoco-base", ("adversary", "start")),
}
"""The recipes that were not released: the recipe that they follow, and the options in which they differ."""

LEFT_OUT = {
    "checkpoint_from",
    "compressed_db",
    "decay_int",
    "decay_rate",
    "decay_st",
    "full_val",
    "img_format",
    "inf_minibatch_size",
    "mask_dir",
    "pin_mem",
    "rank",
    "test_img_db",
    "test_img_dir",
    "test_txt_db",
    "val_batch_size",
    "warm_int",
}
"""Every published key that is read for no option: folders, tests, and settings that no released script has."""


def recipe(name: str) -> TrainOptions:
    return build(TrainOptions, read_yaml(FOLDER / f"{name}.yaml"))


def read(folder: Path, name: str, **changes: Any) -> TrainOptions:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(PUBLISHED[name] | changes), encoding="utf-8")
    return build(TrainOptions, read_configuration(str(path)))


def without(options: TrainOptions, names: tuple[str, ...]) -> dict[str, Any]:
    found = asdict(options)
    for name in names:
        section, _, last = name.rpartition(".")
        del (found[section] if section else found)[last]
    return found


def test_every_recipe_is_released_or_follows_one_that_is() -> None:
    assert sorted(FILES | DERIVED) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert set(FILES.values()) == set(PUBLISHED)


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_has_the_published_values(name: str, tmp_path: Path) -> None:
    left = OTHERWISE.get(name, ())
    assert without(recipe(name), left) == without(read(tmp_path, FILES[name]), left)


@pytest.mark.parametrize("name", DERIVED)
def test_a_recipe_that_was_not_released_has_the_values_of_the_one_it_follows(name: str) -> None:
    source, left = DERIVED[name]
    assert without(recipe(name), left) == without(recipe(source), left)


def test_the_best_run_had_sixteen_gpus(tmp_path: Path) -> None:
    assert recipe("villa-vqa-large-best").sampling.micro_batches == 16 * read(tmp_path, "hps").sampling.micro_batches


def test_a_text_of_several_databases_is_parted(tmp_path: Path) -> None:
    found = read(tmp_path, "hps").data
    assert [Path(name).name for name in found.train_texts] == [
        f"vqa_{name}_large-cased.db" for name in ("train", "trainval", "vg")
    ]
    assert [Path(name).name for name in found.train_images] == ["coco_train2014", "coco_val2014", "vg"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_key_is_read_or_named_as_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read(tmp_path, name)
    lines = capsys.readouterr().err.splitlines()
    said = next((line for line in lines if "left out, " in line), ": ")
    assert set(said.rpartition(": ")[2].split(", ")) == set(PUBLISHED[name]) & LEFT_OUT
    machine = next(line for line in lines if "left to the command line" in line)
    assert set(re.findall(r"(\w+) \(see --", machine)) == set(PUBLISHED[name]) & set(MACHINE)
    assert ("sampling.published_layout" in " ".join(lines)) == name.endswith("-hn")


def test_an_option_is_named_for_what_is_of_the_authors_machine() -> None:
    known = {leaf.name for leaf in leaves(TrainOptions)}
    assert {option.removeprefix("--").partition(",")[0] for option in MACHINE.values()} <= known


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("train-vqa-base-4gpu", "optim", "adamax"),
        ("train-refcoco-base-1gpu", "decay", "vqa"),
        ("hps", "adv_init_mag", 0.1),
        ("hps", "mcan", True),
        ("pretrain-indomain-base-8gpu", "mrm_prob", 0.3),
        ("pretrain-indomain-base-8gpu", "itm_neg_prob", 0.25),
        ("train-nlvr2-base-1gpu", "use_img_type", False),
    ],
)
def test_a_setting_without_an_option_has_its_released_value_or_is_refused(
    file: str, key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {key} .*, as released, got {value!r}"):
        read(tmp_path, file, **{key: value})


def test_the_published_filling_is_kept_where_eight_of_the_longest_fit(tmp_path: Path) -> None:
    assert read(tmp_path, "train-vcr-large-4gpu-adv").sampling.filling == "full"
    assert read(tmp_path, "train-vcr-large-4gpu-adv", train_batch_size=3360).sampling.filling == "uniter"


def test_regions_are_detected_where_the_val_images_are_not_those_that_people_drew(tmp_path: Path) -> None:
    assert read(tmp_path, "train-refcoco-base-1gpu").data.detected
    assert not read(tmp_path, "train-refcoco-base-1gpu", val_img_db="/img/re_coco_gt").data.detected


@pytest.mark.parametrize("name", ["villa-vqa-base", "villa-vcr-large"])
def test_a_changed_recipe_is_noticed(name: str, tmp_path: Path) -> None:
    whole = recipe(name)
    changed = replace(whole, adversary=AdversaryOptions(modalities=("text",), steps=2))
    assert without(changed, ()) != without(read(tmp_path, FILES[name]), ())
