"""A person's JSON lines and region features, from `advvl data convert` to `advvl train`, `evaluate` and `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advvl.data.wordpiece import build_tokenizer, save_tokenizer
from advvl.experiments.cli import main
from advvl.experiments.data_convert import TASKS

IMAGES, RECORDS = 4, 8
WORDS = ("two dogs", "a red car", "what is it ?", "the sea")
CHOICES = {"answers": ["a car", "dogs", "two", "it"], "rationales": ["red", "is", "it", "the sea"]}


def record(task: str, number: int) -> dict[str, Any]:
    """A record of a task that is converted."""
    image, text = f"picture-{number % IMAGES}", WORDS[number % len(WORDS)]
    match task:
        case "vqa":
            return {"text": text, "answers": ("red", "dog", "two")[number % 3], "image": image}
        case "ve":
            return {"text": text, "label": ("neutral", "entailment")[number % 2], "image": image}
        case "nlvr2":
            return {"text": text, "left": image, "right": f"picture-{(number + 1) % IMAGES}", "target": number % 2}
        case "vcr":
            return {"question": text, **CHOICES, "answer": number % 4, "rationale": 1, "image": image}
        case "captions":
            return {"text": [text, "it is red"], "image": image}
    return {"text": text, "target": number % 2, "image": image}


SPECIAL: dict[str, list[str]] = {
    "vqa": ["--model.answers", "3", "--data.answers", "ans2label.json", "--sampling.tokens", "60"],
    "ve": ["--sampling.tokens", "60"],
    "nlvr2": ["--sampling.tokens", "60"],
    "vcr": ["--sampling.tokens", "120"],
    "referring": ["--data.num_bb", "100", "--sampling.batch_size", "4"],
    "retrieval": ["--sampling.batch_size", "2"],
    "pretraining": ["--mixture.mlm", "1", "--mixture.itm", "1", "--sampling.tokens", "60"],
    "vcr-pretraining": ["--mixture.mlm", "1", "--mixture.mrfr", "1", "--sampling.tokens", "60"],
}
"""The options that a task needs beyond those of all."""
TRAINED = [(task, task) for task in TASKS if task != "captions"]
TRAINED += [("captions", "retrieval"), ("captions", "pretraining"), ("vcr", "vcr-pretraining")]


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with region features and a tokeniser, in which commands run; the options of a small model for them."""
    monkeypatch.chdir(tmp_path)
    Path("regions").mkdir()
    for number in range(IMAGES):
        generator = np.random.default_rng(number)
        corners = np.sort(generator.random((2 + number, 2, 2)), axis=1).reshape(-1, 4)
        features = generator.random((2 + number, 6)).astype("f4")
        np.savez(f"regions/picture-{number}.npz", features=features, boxes=corners * 30, size=[30, 30])
    tokenizer = build_tokenizer([*WORDS, *(text for texts in CHOICES.values() for text in texts)])
    save_tokenizer(tokenizer, "mine/tokenizer.json")
    width = ["--model.hidden_size", "24", "--model.intermediate_size", "16", "--model.img_dim", "6"]
    depth = ["--model.num_hidden_layers", "1", "--model.num_attention_heads", "2"]
    return [*width, *depth, "--model.vocab_size", str(tokenizer.get_vocab_size())]


@pytest.mark.parametrize(("kind", "task"), TRAINED, ids=[task for _, task in TRAINED])
def test_own_records_are_converted_trained_scored_and_predicted(
    kind: str, task: str, sizes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.jsonl").write_text("\n".join(json.dumps(record(kind, number)) for number in range(RECORDS)))
    answers = ["--answers", "ans2label.json"] if kind == "vqa" else []
    command = ["data", "convert", "own.jsonl", "--task", kind, "--tokenizer", "mine/tokenizer.json", *answers]
    assert main([*command, "--features", "regions", "--text-db", "own.db", "--image-db", "images"]) == 0
    said = capsys.readouterr().out
    for name in {"vqa": ("model.answers",), "referring": ("data.num_bb",)}.get(kind, ()):
        assert f"--{name} {SPECIAL[kind][SPECIAL[kind].index(f'--{name}') + 1]}\n" in said
    folders = [f"--data.{part}_{name}" for part in ("train", "val") for name in ("texts", "images")]
    data = [word for pair in zip(folders, 2 * ["own.db", "images"], strict=True) for word in pair]
    options = ["--task", task, "--device", "cpu", *data, *sizes, *SPECIAL[task]]
    updates = ["--optimizer.updates", "2", "--optimizer.warmup", "1", "--adversary.modalities", "text,image"]
    assert main(["train", *options, *updates]) == 0, capsys.readouterr().err
    assert main(["evaluate", *options, *updates]) == 0
    scores = json.loads(Path("runs/train/scores-own.json").read_text())
    assert all(0 <= value <= 1 for name, value in scores.items() if not name.endswith("loss"))
    if "pretraining" not in task:
        assert main(["predict", *options, *updates]) == 0
        (found,) = Path("runs/train").glob("predictions-own.*")
        text = found.read_text()
        keys = [line.partition(",")[0] for line in text.splitlines()]
        if found.suffix == ".json":
            read = json.loads(text)
            keys = [str(one["question_id"]) for one in read] if task == "vqa" else list(read)
        lines = range(1, RECORDS + 1)
        names = (
            [f"{n}.{place}" for n in lines for place in range(2)] if task == "retrieval" else [str(n) for n in lines]
        )
        assert keys[task == "vcr" :] == names
