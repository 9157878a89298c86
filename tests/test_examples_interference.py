"""Modality interference on digits: the example's table, and that the other modality is what misleads."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.examples import load_example

from advvl.experiments.cli import command


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("interference_digits")


def test_the_modality_that_counts_names_the_answer_and_the_other_agrees_as_often_as_asked(example: ModuleType) -> None:
    whole = example.source(slice(0, 200), 0.8, 0)
    batch = whole.batch(range(len(whole)))
    said, answers, needs_words = batch["words"][:, 1] - 2, batch["targets"].argmax(1), batch["needs_words"][:, 0]
    assert torch.equal(batch["words"][:, 0] == example.READ, needs_words)
    assert torch.equal(said[needs_words], answers[needs_words])
    agrees = said[::2] == answers[::2]
    assert 0.75 < agrees.double().mean() < 0.9  # a tenth of the others agrees by chance
    masks = {name: site.mask(batch) for name, site in example.SITES.items()}
    assert torch.equal(masks["image"].all(1), needs_words)
    assert not masks["text"][:, 0].any()
    assert torch.equal(masks["text"][:, 1], ~needs_words)


@pytest.mark.slow
def test_it_trains_attacks_and_tells(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--finetune.epochs", "1", "--jobs", "1", "--evaluation.examples", "20", "--evaluation.steps", "2"]
    assert command(example.INTERFERENCE_DIGITS, "", ["--output", str(tmp_path / "out"), *arguments]) == 0
    table = (tmp_path / "out" / "interference.md").read_text()
    assert table in capsys.readouterr().out
    assert "| method | as in training | other picture or word | picture counts | word counts |" in table
    for row in ("standard", "standard, equal compute", "modality interference"):
        assert f"\n| {row} | " in table
