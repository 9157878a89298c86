"""The experiment on NLVR runs end to end on invented statements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nlvr_files import write_corpus

from advvl.errors import ConfigurationError
from advvl.evaluation.measurement import versions
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.cli import exit_status, main
from advvl.experiments.experiment import Task
from advvl.experiments.nlvr import NLVR, NlvrOptions
from advvl.experiments.outputs import claim
from advvl.experiments.results import versions_of
from advvl.experiments.runner import run
from advvl.experiments.villa_options import UniterSize
from advvl.fit.options import OptimizerOptions

SIZE = UniterSize(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def options(folder: Path, **changes: Any) -> NlvrOptions:
    return NlvrOptions(
        **{
            "data_dir": str(folder / "files"),
            "output": str(folder / "run"),
            "methods": ("standard", "both-stages"),
            "jobs": 1,
            "model": SIZE,
            "copies": 2,
            "tokens": 256,
            "finetune": OptimizerOptions(epochs=4),
            "pretrain": OptimizerOptions(epochs=1),
            "evaluation": EvaluationOptions(radii=(0.3,), text_radii=(), steps=4, restarts=1, examples=48),
            **changes,
        }
    )


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "files")
    run(NLVR, options(tmp_path), progress=False)
    said = capsys.readouterr().out
    assert "dev.json: 48 statements, 50.0 % in the larger class" in said
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert found["chance"] == pytest.approx(0.5)
    assert found["versions"] == versions()
    for name in ("standard", "adversarial-villa"):
        scores = json.loads((tmp_path / "run" / "seed-0" / f"{name}.json").read_text(encoding="utf-8"))["scores"]
        assert len(scores["clean"]) == 48
        assert set(scores["clean"]) == {0.0, 1.0}


def test_a_run_that_went_on_under_another_version_names_both() -> None:
    records: list[dict[str, Any]] = [{"versions": {"advvl": "0.2"}}, {"versions": {"advvl": "0.10"}}, {}]
    assert versions_of("advvl", records[:1]) == "0.2"
    assert versions_of("advvl", records) == "0.10, 0.2, not recorded"


def test_rows_of_like_lengths_fill_the_budget_and_the_split_is_chosen(tmp_path: Path) -> None:
    write_corpus(tmp_path / "files")
    chosen = options(tmp_path, evaluation=EvaluationOptions(split="validation"))
    directory = claim(chosen.output, {})
    corpus = NLVR.data(chosen, directory)
    pretrained, *_ = NLVR.rows(chosen)
    first = NLVR.set_up(chosen, corpus, Task(0, pretrained), None)
    assert first.adversarial_tasks == ("mlm", "itm")
    assert first.sampler is not None
    for part in first.sampler.parts(0, 0):
        batch = corpus.pretrain.batch(part, torch.Generator())
        assert batch["attn_masks"].numel() <= 256


def test_a_corpus_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: run(NLVR, options(tmp_path), progress=False)) == 2
    assert "dev.json" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="expected --data-dir, the folder of NLVR's dev"):
        NlvrOptions()
    assert main(["nlvr"]) == 2
    assert "--data-dir" in capsys.readouterr().err
