"""`advvl sites` prints the table of a saved model, and says in one line what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import advvl
from advvl.experiments.cli import main


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_saved_model_and_a_batch_file_give_the_table(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3)}
    save_file(batch, saved.parent / "batch.safetensors")
    assert main(["sites", str(saved), "--batch", str(saved.parent / "batch.safetensors")]) == 0
    assert capsys.readouterr().out.strip() == str(advvl.sites(BertModel.from_pretrained(saved), batch))
    assert main(["sites", str(saved), "--class", "BertModel"]) == 0
    assert "embeddings.word_embeddings:output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "Trainer"], "from_pretrained"),
        (["--batch", "nowhere.pt"], "nowhere.pt"),
        (["--btch", "x"], "got unrecognized arguments: --btch x; the flag nearest to --btch is --batch"),
        (["more"], "got unrecognized arguments: more"),
    ],
)
def test_bad_arguments_are_one_line(
    saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sites", str(saved), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: expected")
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["sites", str(tmp_path / "empty")]) == 2
    assert "cannot load" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_not_asked_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def unreachable(name: str, timeout: float) -> None:
        raise ConnectionError(name, timeout)

    def load(name: str, *, local_files_only: bool) -> None:
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load)
    assert main(["sites", "no-such/model"]) == 2
    assert "'no-such/model', which is no folder here, and transformers cannot load: not in" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.model_info", lambda name, timeout: None)
    assert main(["sites", "no-such/model"]) == 2
    assert asked == [True, False]
