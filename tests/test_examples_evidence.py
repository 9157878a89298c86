"""The command of the evidence runs its studies, goes on where it was, and writes one page of them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml
from support.tiny import VALUES

EXAMPLE = Path(__file__).parents[1] / "examples" / "evidence.py"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    values = {**VALUES, "finetune": {"epochs": 1, "batch_size": 16}, "pretrain": {"epochs": 1, "batch_size": 16}}
    del values["methods"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    sizes = ["--data.train_questions", "48", "--finetune.epochs", "1", "--pretrain.epochs", "1"]
    return [
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--config",
        str(tmp_path / "small.yaml"),
        *sizes,
    ]


@pytest.mark.slow
def test_two_studies_share_models_and_one_page(small: list[str], tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--study", "ingredients", *small])
    standard = tmp_path / "out" / "digits" / "seed-0" / "standard.json"
    first, page = standard.stat().st_mtime_ns, (tmp_path / "out" / "evidence.md").read_text()
    assert "VILLA without KL" in page
    main(["--study", "stage-one", *small])
    main(["--study", "ingredients", *small])
    assert standard.stat().st_mtime_ns == first  # resumed, not trained again
    page = (tmp_path / "out" / "evidence.md").read_text()
    assert page.index("## ingredients") < page.index("## stage-one") < page.index("VILLA, both stages")
    for study in ("ingredients", "stage-one"):
        assert (tmp_path / "out" / f"accuracy_against_radius-{study}.png").stat().st_size > 1000
        assert (tmp_path / "out" / f"results-{study}.json").is_file()


def test_people_s_words_need_their_corpus(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    globals_ = runpy.run_path(str(EXAMPLE))
    assert globals_["exit_status"](lambda: globals_["main"](["--study", "colors", "--output", small[1]])) == 2
    assert "--data-dir" in capsys.readouterr().err
