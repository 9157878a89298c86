"""UNITER's and VILLA's own configurations in JSON, read as options of `advvl train`.

Their scripts differ by task, which a file does not name: the names of its databases tell it, or a key "task" that is added.
The number of GPUs is in the file's name, as in `train-vqa-base-4gpu.json`. Paths of their containers, /txt, /db, /img and
/pretrain, are taken to be `txt_db`, `img_db` and `pretrained` under the data directory.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

from advvl.checks import is_number, is_whole, shown
from advvl.errors import ConfigurationError
from advvl.experiments.config import Layer, read_yaml
from advvl.experiments.progress import counted
from advvl.experiments.published_keys import FIXED, FOLDERS, MACHINE, READ, SAME, STEPS, TASKS
from advvl.experiments.train_options import TaskName
from advvl.files import parse_json

_BUNDLE: Final = 8  # examples that the published filling of a budget takes together


def read_configuration(path: str) -> Layer:
    """Read a file of options: UNITER's or VILLA's JSON where it ends in `.json`, YAML otherwise.

    What a JSON file says that has no meaning here is named on standard error, as is what was concluded.

    Raises:
        ConfigurationError: a file that cannot be read, that does not say its task, or with a value of another type.
    """
    if Path(path).suffix != ".json":
        return read_yaml(path)
    try:
        found = parse_json(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"expected a configuration in JSON at {path!r}, got {error}; check CONFIG") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"expected a JSON object in {path!r}, got {shown(found)}")
    values, notes = translated(found, path)
    print("\n".join(f"{path}: {note}" for note in notes), file=sys.stderr)
    return Layer(path, values)


def translated(found: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """Turn a published configuration into nested options, and notes on what was concluded and what left out.

    Raises:
        ConfigurationError: see `read_configuration`.
    """
    read = _Reading(dict(found), path)
    read.put("task", read.task)
    for theirs, ours in SAME.items():
        if theirs in found:
            read.put(ours, found[theirs])
    read.databases()
    read.model()
    read.updates()
    read.adversary()
    read.fixed()
    elsewhere = [f"{key} (see {option})" for key, option in MACHINE.items() if key in found]
    if elsewhere:
        read.notes.append(f"left to the command line: {', '.join(elsewhere)}")
    ignored = sorted(set(found) - set(SAME) - READ - set(FIXED) - set(MACHINE))
    if ignored:
        read.notes.append(f"left out, without a meaning here: {', '.join(ignored)}")
    return read.values, read.notes


class _Reading:
    """The options of one file, as far as they are read."""

    def __init__(self, found: dict[str, Any], path: str) -> None:
        self.found, self.file = found, path
        self.values: dict[str, Any] = {}
        self.notes: list[str] = []
        self.task = self._task()

    def put(self, name: str, value: Any) -> None:
        section, _, last = name.rpartition(".")
        (self.values.setdefault(section, {}) if section else self.values)[last] = value

    def number(self, name: str, default: float) -> Any:
        value = self.found.get(name, default)
        if not is_number(value):
            raise ConfigurationError(f"expected {name} to be a number, got {shown(value)} in {self.file}")
        return value

    def texts(self, *names: str) -> list[str]:
        """Return the paths under the first of these keys that is there; a text may hold several, joined by ":"."""
        value: Any = next((self.found[name] for name in names if name in self.found), [])
        paths = re.split(":(?=/)", value) if isinstance(value, str) else value
        if not _are_texts(paths):
            raise ConfigurationError(f"expected {names[0]} to be paths, got {shown(value)} in {self.file}")
        return paths

    def path(self, name: str) -> str:
        """Return the one path under a key."""
        value = self.found[name]
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"expected {name} to be a path, got {shown(value)} in {self.file}")
        return value

    def databases(self) -> None:
        """Read the databases, and the mixture of pre-training."""
        corpora = self._corpora("train_datasets")
        if corpora:
            self.put("mixture.corpora", [name for name, texts, _, _ in corpora for _ in texts])
            for task in ("mlm", "itm", "mrfr", "mrc", "mrc_kl"):
                ratios = [mix.get(task, 0) for _, _, _, mix in corpora]
                self.put(f"mixture.{task}", ratios if any(ratios) else [])
            self.notes.append("train_datasets: every corpus is learnt by the ratios of its own tasks")
        for part in ("train", "val"):
            texts = self.texts(f"{part}_txt_dbs", f"{part}_txt_db")
            images = self.texts(f"{part}_img_dbs", f"{part}_img_db", f"{part}_img_dir")
            for _, more, pictures, _ in self._corpora(f"{part}_datasets"):
                texts, images = [*texts, *more], [*images, *pictures]
            pairs = [one.split(";") for one in images]
            self.put(f"data.{part}_texts", [_under(one) for one in texts])
            self.put(f"data.{part}_images", [_under(pair[-1]) for pair in pairs])
            if any(len(pair) > 1 for pair in pairs):
                self.put(f"data.{part}_drawn", [_under(pair[0]) for pair in pairs])
            if self.task == "referring" and part == "val" and images:
                self.put("data.detected", not any("coco_gt" in one for one in images))
        if self.found.get("conf_th") == -1:
            self.put("data.conf_th", 0.2)
            self.put("data.num_bb", self.number("num_bb", 36))

    def model(self) -> None:
        """Read the size, the head, and the checkpoint."""
        if "model_config" in self.found:
            config = self.path("model_config")
            size = re.search(r"(?:uniter|bert)-(base|large)", config)
            self.put("model.size" if size else "model.config", size[1] if size else config)
        if "checkpoint" in self.found:
            self.put("start", _under(self.path("checkpoint")))
        if self.task == "nlvr2" and "model" in self.found:
            self.put("model.variant", self.found["model"])
        if self.task == "referring" and "train_loss" in self.found:
            self.put("model.loss", self.found["train_loss"])

    def updates(self) -> None:
        """Read the micro-batches of an update, and the gradient's clipping."""
        named = re.search(r"(\d+)gpu", Path(self.file).name)
        gpus, accumulated = int(named[1]) if named else 1, self.number("gradient_accumulation_steps", 1)
        if not is_whole(accumulated) or accumulated < 1:
            raise ConfigurationError(
                f"expected gradient_accumulation_steps of 1 or more, got {shown(accumulated)} in {self.file}"
            )
        said = "from the file's name" if named else "since its name does not say"
        size = self.number("train_batch_size", 0)
        summed, micro_batches = accumulated, gpus * accumulated
        if self.task == "hard-retrieval":
            micro_batches *= 2 * size
            summed = 2 * accumulated  # of a match both sides are summed, and then divided by train_batch_size
            self.put("sampling.published_layout", True)
            self.notes.append("an image's longer texts lose regions, as published: sampling.published_layout")
        elif self.task in ("retrieval", "referring"):
            self.put("sampling.batch_size", size)
            summed *= size if self.task == "referring" else 1  # its loss is a sum over the batch
        else:
            rows = 4 if self.task == "vcr" else 1
            self.put("sampling.tokens", rows * size)
            fits = rows == 1 or size >= _BUNDLE * (self.number("max_txt_len", 220) + 2 * self.number("max_bb", 100))
            self.put("sampling.filling", "uniter" if fits else "full")
            if rows > 1:
                self.notes.append(f"train_batch_size {size} counts one of a question's four rows: {rows * size} tokens")
            if not fits:
                self.notes.append(
                    f"train_batch_size {size} is less than {_BUNDLE} of the longest examples: filling full"
                )
        if "negative_size" in self.found:
            chosen = "candidates" if self.task == "hard-retrieval" else "negatives"
            self.put(f"sampling.{chosen}", self.found["negative_size"])
        if self.task in ("retrieval", "hard-retrieval"):
            self.put("evaluation.published_recall", True)
            self.notes.append("image recall is counted as published, and may pass 1: evaluation.published_recall")
        self.put("sampling.micro_batches", micro_batches)
        self.notes.append(
            f"task {self.task}; {counted(gpus, 'GPU')}, {said}; micro-batches per update: {micro_batches}"
        )
        self.put("optimizer.summed", summed)
        clip = self.number("grad_norm", 2.0)
        self.put("optimizer.clip", clip if clip > 0 else math.inf)

    def adversary(self) -> None:
        """Read VILLA's adversary."""
        if not self.found.get("adv_training", False):
            return
        named = self.texts("adv_modality")
        in_turn = "alter" in named
        modalities = [name for name in STEPS if in_turn or name in named]
        self.put("adversary.modalities", modalities)
        self.put("adversary.order", "in turn" if in_turn else "together")
        for name in modalities:
            self.put(f"adversary.{name}_step", self.number(STEPS[name], 0))
        for theirs, ours in (("adv_steps", "steps"), ("norm_type", "norm")):
            if theirs in self.found:
                self.put(f"adversary.{ours}", self.found[theirs])
        weight, radius = self.number("adv_kl_weight", 0), self.number("adv_max_norm", 0)
        if self.task == "vcr" and weight:
            weight = weight / 2
            self.notes.append(f"adv_kl_weight is a mean over both classes too: kl_weight {weight} here")
        self.put("adversary.kl_weight", weight)
        self.put("adversary.max_norm", radius or math.inf)

    def fixed(self) -> None:
        """Refuse another value than the released files have, where there is no option for it."""
        for name, value in FIXED.items():
            if self.found.get(name, value) != value:
                raise ConfigurationError(
                    f"expected {name} {value!r}, as released, got {shown(self.found[name])} in {self.file}; remove it"
                )

    def _task(self) -> str:
        said = self.found.get("task")
        if said is not None:
            if said not in get_args(TaskName):
                raise ConfigurationError(
                    f"expected task to be one of {', '.join(get_args(TaskName))}, got {shown(said)} in {self.file}"
                )
            return str(said)
        if "train_datasets" in self.found:
            second = "vcr" in str(self.found["train_datasets"])
            return "vcr-pretraining" if second else "pretraining"
        names = [Path(name).name for name in self.texts("train_txt_dbs", "train_txt_db")]
        first = re.match(r"[a-z0-9+]+", names[0].lower()) if names else None
        task = TASKS.get(first[0]) if first else None
        if task is None:
            raise ConfigurationError(
                f"expected the name of a database that tells the task, got {names} in {self.file}; add a key task"
            )
        return "hard-retrieval" if task == "retrieval" and "hard_neg_size" in self.found else task

    def _corpora(self, name: str) -> list[tuple[str, list[str], list[str], dict[str, int]]]:
        """Return the name, databases of texts and of images, and ratios of tasks, of each corpus of pre-training."""
        corpora = self.found.get(name, [])
        if not isinstance(corpora, list):
            raise ConfigurationError(f"expected {name} to be a list of corpora, got {shown(corpora)} in {self.file}")
        found = []
        for one in corpora:
            parts: list[Any] = [one.get(key, []) for key in ("db", "img", "tasks")] if isinstance(one, dict) else [None]
            ratios = one.get("mix_ratio", [1] * len(parts[-1])) if all(map(_are_texts, parts)) else None
            if not isinstance(ratios, list) or len(ratios) != len(parts[-1]) or not all(map(is_whole, ratios)):
                raise ConfigurationError(
                    f"expected {name} with lists db, img, tasks and as many mix_ratio, got {shown(one)} in {self.file}"
                )
            texts, images, tasks = parts
            mix = {mixed: ratio for task, ratio in zip(tasks, ratios, strict=True) if (mixed := _mixed(task))}
            found.append((str(one.get("name", name)), texts, images, mix))
        return found


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _mixed(task: str) -> str:
    """Return our name of a task of pre-training, as a field of options."""
    name = task.partition("_")[0]
    return {"mrckl": "mrc_kl"}.get(name, name) if name in ("mlm", "itm", "mrfr", "mrc", "mrckl") else ""


def _under(path: str) -> str:
    """Turn a path of their containers into one under the data directory."""
    parts = [part for part in path.split("/") if part]
    if path.startswith("/") and parts and parts[0] in FOLDERS:
        return "/".join([FOLDERS[parts[0]], *parts[1:]])
    return path
