"""The example that makes a report page of models trained on the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.examples import EXAMPLES, load_example
from support.spawn import Script
from support.tiny import VALUES

from advvl import adapt
from advvl.data.digits.corpus import DigitsConfig, digits_corpus
from advvl.evaluation.examples import Damage
from advvl.experiments.cli import main
from advvl.experiments.villa_options import UniterSize
from advvl.experiments.villa_stages import config_of
from advvl.tasks.uniter.vqa import UniterForVQA

EXAMPLE = EXAMPLES / "report_digits.py"


@pytest.mark.slow
def test_a_page_is_made_of_the_models_of_a_run(tmp_path: Path) -> None:
    config, run, page = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "report"
    config.write_text(yaml.safe_dump(VALUES))
    assert main(["villa-uniter", "--config", str(config), "--methods", "standard", "--output", str(run)]) == 0
    arguments = (run, "--models", "standard", "--examples", "2", "--output", page)
    status, said, complaints = Script(EXAMPLE, *arguments, folder=tmp_path).finish()
    assert status == 0, complaints
    assert f"The page is {page / 'report.html'}" in said
    assert "other image" in said
    assert "Questions about digits" in (page / "report.html").read_text()


def test_an_example_is_drawn_with_its_scene_and_question() -> None:
    example = load_example("report_digits")
    corpus = digits_corpus(DigitsConfig(**VALUES["data"]))
    model = UniterForVQA(config_of(UniterSize(**VALUES["model"]), corpus), num_answers=len(corpus.answers))
    damage = Damage(model="tiny", example=0, budget=3, attack=0, clean=1.0, worst=0.0, norms={})
    found = example.drawn(corpus, {"tiny": adapt(model.eval())}, damage)
    scene = corpus.test.scenes[int(corpus.test.image_rows[0])]
    assert len(found.regions) == len(found.region_heat) == len(scene)
    assert found.words[0] == "[CLS]"
    assert found.truth == corpus.test.questions[0].answer
    for cell in range(9):  # ink where there are digits, and nowhere else
        top, left = 96 * (cell // 3), 96 * (cell % 3)
        assert (found.picture[top : top + 96, left : left + 96].min() < 1) == (cell in scene.cells)
