"""Examples that cannot be used: refused by their database and key, or left out and listed where `data.skip_bad` says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.task_databases import META, fields, options_of, values, write_databases

from advvl.data.uniter.text_writer import write_texts
from advvl.experiments.cli import main

LOST: dict[str, dict[str, Any]] = {
    "nlvr2": {"img_fname": ["i0.npz", "gone.npz"]},
    "vcr": {"img_fname": ["gone.npz", "i0.npz"]},
}
"""A record whose image is in no database, where that takes more than the name of one."""


def configured(task: str, root: Path, *, bad: dict[str, Any]) -> str:
    """Write a database of a task in which one record is bad, and options to train and to score on it."""
    more: dict[str, Any] = {
        "data": {"train_texts": ["odd.db"], "val_texts": ["odd.db"]},
        "optimizer": {"updates": 2, "warmup": 0},
        "evaluation": {"every": 1},
    }
    options = options_of(task, root, **more)
    write_databases(options_of(task, root), root)
    with write_texts(root / "odd.db", META) as texts:
        for number in range(7):
            record = {"input_ids": [6 + number, 7], **fields(task, number)}
            texts.add(f"test-{number}", {**record, **bad} if number == 3 else record)
    path = root / "options.yaml"
    path.write_text(yaml.safe_dump(values(task, root, **more)))
    assert options.data.val_texts == ("odd.db",)
    return str(path)


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "vcr", "retrieval", "pretraining"])
def test_an_example_without_its_image_is_refused_or_left_out_and_listed(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(task, tmp_path, bad=LOST.get(task, {"img_fname": "gone.npz"}))
    assert main(["train", config]) == 2
    assert "odd.db, record 'test-3': expected" in capsys.readouterr().err
    assert main(["train", config, "--data.skip_bad"]) == 0
    said = capsys.readouterr().err
    for line in ("skipped: 1 example\n", "odd.db, record 'test-3': expected"):
        assert said.count(line) == 2  # before the first update, and of the val databases at their first evaluation
    assert main(["evaluate", config]) == 2
    assert "odd.db, record 'test-3': expected" in capsys.readouterr().err
    assert main(["evaluate", config, "--data.skip_bad"]) == 0
    said = capsys.readouterr().err
    assert said.count("skipped: 1 example\n") == said.count("'gone.npz'") == 1
    if task == "pretraining":
        return
    assert main(["predict", config, "--data.skip_bad"]) == (2 if task == "vqa" else 0)  # VQA needs a table of answers
    for path in (tmp_path / "out").glob("predictions-odd.*"):
        found = path.read_text()
        assert "test-2" in found
        assert "test-3" not in found


def test_an_example_over_the_budget_is_refused_or_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("vqa", tmp_path, bad={"input_ids": [8] * 50})
    assert main(["train", config, "--sampling.tokens", "40"]) == 2
    said = capsys.readouterr().err
    assert "at most 40 tokens, got 1 longer ones, the first " in said
    assert "odd.db, record 'test-3' of 54; raise the budget" in said
    assert main(["train", config, "--sampling.tokens", "40", "--data.skip_bad"]) == 0
    said = capsys.readouterr().err
    assert "odd.db, record 'test-3': 54 tokens, over the budget of a batch\nskipped: 1 example\n" in said
    scores = json.loads((tmp_path / "out" / "training-scores.json").read_text())
    assert set(scores) == {"1", "2"}


def test_an_attack_leaves_out_and_lists_what_a_score_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured("vqa", tmp_path, bad={"img_fname": "gone.npz"})
    assert main(["train", config, "--data.skip_bad"]) == 0
    attack = ["evaluate", config, "--attack", "pgd", "--radius", "image=L2:1", "--robustness.steps", "1"]
    capsys.readouterr()
    assert main(attack) == 2
    assert "odd.db, record 'test-3': expected" in capsys.readouterr().err
    assert main([*attack, "--data.skip_bad"]) == 0
    said = capsys.readouterr().err
    assert said.count("skipped: 1 example\n") == said.count("'gone.npz'") == 1
