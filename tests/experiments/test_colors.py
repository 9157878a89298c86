"""The experiment on colours runs end to end on invented games, and shows what it says it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from support.color_files import corpus

from advvl import adapt
from advvl.data.colors.corpus import MOST_TOKENS, colors_corpus
from advvl.data.sampling import TokenBuckets
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.evaluation.robustness import WorstCase, robustness_curve
from advvl.experiments import color_report
from advvl.experiments.cli import exit_status
from advvl.experiments.color_report import draw_swatches
from advvl.experiments.colors import COLORS, ColorsOptions
from advvl.experiments.experiment import Task
from advvl.experiments.outputs import claim
from advvl.experiments.runner import run
from advvl.experiments.villa_options import UniterSize
from advvl.experiments.villa_stages import config_of
from advvl.fit.options import OptimizerOptions
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.tasks.uniter.referring import UniterForReferringExpressions

SIZE = UniterSize(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def options(folder: Path, **changes: Any) -> ColorsOptions:
    short = OptimizerOptions(epochs=1, batch_size=32)
    return ColorsOptions(
        **{
            "data_dir": str(folder / "files"),
            "output": str(folder / "run"),
            "methods": ("standard", "both-stages"),
            "jobs": 1,
            "model": SIZE,
            "finetune": short,
            "pretrain": short,
            "evaluation": EvaluationOptions(radii=(0.3,), text_radii=(), steps=4, restarts=1, examples=20),
            **changes,
        }
    )


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path / "files", games=40)
    run(COLORS, options(tmp_path), progress=False)
    said = capsys.readouterr().out
    assert "240 rounds of 40 games; 0 skipped" in said
    table = (tmp_path / "run" / "conditions.md").read_text(encoding="utf-8")
    assert table in said
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names == ["listener", "---", "people", "standard", "VILLA, both stages"]
    rounds = colors_corpus(tmp_path / "files").rounds["test"]
    scores = json.loads((tmp_path / "run" / "seed-0" / "standard.json").read_text(encoding="utf-8"))["scores"]["clean"]
    cells = next(line for line in table.splitlines() if line.startswith("| standard")).split("|")[2:6]
    for cell, kind in zip(cells, (None, "far", "split", "close"), strict=True):
        hits = [score for score, one in zip(scores, rounds, strict=True) if kind in (None, one.condition)]
        assert float(cell.split()[0]) == pytest.approx(100 * sum(hits) / len(hits), abs=0.06)
    assert imread(tmp_path / "run" / "swatches.png").ndim == 3
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert 1 / 3 <= results["chance"] < 0.7
    assert len(results["data_fingerprint"]) == 16
    record = tmp_path / "run" / "seed-0" / "standard.json"
    record.write_text(record.read_text().replace(results["data_fingerprint"], "0" * 16))
    with pytest.raises(DataError, match=r"tested on the same examples in .*, got 2 sets"):
        run(COLORS, options(tmp_path, resume=True), progress=False)


def test_rounds_are_learnt_by_length_and_attacked_inside_the_box_of_colours(tmp_path: Path) -> None:
    corpus(tmp_path / "files", games=40)
    chosen = options(tmp_path, tokens=200)
    directory = claim(chosen.output, {})
    made = COLORS.data(chosen, directory)
    pretrained, *_ = COLORS.rows(chosen)
    first = COLORS.set_up(chosen, made, Task(0, pretrained), None)
    save_checkpoint(first.model, tmp_path / "start.safetensors")
    row = next(row for row in COLORS.rows(chosen) if row.stage == "finetune")
    second = COLORS.set_up(chosen, made, Task(0, row), tmp_path / "start.safetensors")
    for setup in (first, second):
        assert isinstance(setup.sampler, TokenBuckets)
        assert setup.sampler.tokens == 200
    assert second.boxes == {"image": (0.0, 1.0)}


def test_without_a_corpus_it_says_where_one_is() -> None:
    with pytest.raises(ConfigurationError, match="--data-dir"):
        ColorsOptions()


def test_a_corpus_that_is_not_there_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="files"):
        run(COLORS, options(tmp_path), progress=False)
    assert exit_status(lambda: run(COLORS, options(tmp_path), progress=False)) == 2


def test_utterances_are_cut_and_rare_words_spelt(tmp_path: Path) -> None:
    folder = corpus(tmp_path, games=40)
    first = sorted((folder / "message").iterdir())[0]
    first.write_text(first.read_text().replace(" please", " please" * 60), encoding="utf-8")
    made = colors_corpus(folder)
    longest = max(int(part.texts.lengths.max()) for part in (made.train, made.validation, made.test))
    assert longest == MOST_TOKENS
    assert made.tokenizer.encode("red").tokens == ["[CLS]", "red", "[SEP]"]
    assert made.tokenizer.encode("mauve").tokens[1:3] == ["m", "##a"]
    batch = made.test.batch([0, 1])
    assert [made.rounds["test"][0].target, made.rounds["test"][1].target] == batch["targets"].tolist()
    assert ((batch["img_feat"] >= 0) & (batch["img_feat"] <= 1)).all()


@pytest.mark.parametrize("boxes", [{"image": (0.0, 1.0)}, {}], ids=["boxed", "free"])
def test_an_evaluation_in_a_box_shows_the_model_nothing_but_colours(tmp_path: Path, boxes: Any) -> None:
    made = colors_corpus(corpus(tmp_path, games=40))
    torch.manual_seed(0)
    model = UniterForReferringExpressions(config_of(SIZE, made))
    seen: list[tuple[float, float]] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((float(inputs[0].detach().min()), float(inputs[0].detach().max())))

    with model.uniter.img_embeddings.img_linear.register_forward_hook(look):
        robustness_curve(
            adapt(model),
            [made.test.batch(range(20))],
            modality="image",
            radii=(3.0,),
            attacks=WorstCase(restarts=2, steps=8, boxes=boxes),
        )
    lowest, highest = (choose(numbers) for choose, numbers in zip((min, max), zip(*seen, strict=True), strict=True))
    assert (lowest >= 0 and highest <= 1) == bool(boxes)


def test_swatches_are_drawn_even_where_no_attack_succeeds(tmp_path: Path) -> None:
    made = colors_corpus(corpus(tmp_path, games=40))
    torch.manual_seed(0)
    model = UniterForReferringExpressions(config_of(SIZE, made))
    draw_swatches(
        [("one", model)], made.rounds["test"], made.tokenizer, tmp_path / "swatches.png", radius=1e-6, steps=10, count=3
    )
    assert imread(tmp_path / "swatches.png").ndim == 3


def test_swatches_favour_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown are the first rounds that all get right and any one loses, whichever that is."""
    made = colors_corpus(corpus(tmp_path, games=40))
    targets = made.test.batch(range(6))["targets"]
    wrong = (targets + 1) % 3
    colours = torch.zeros(6, 3, 3)
    after = {"one": torch.tensor([0, 1, 1, 1, 1, 1]), "two": torch.tensor([1, 0, 1, 1, 1, 0])}  # 0 is a mistake
    before = {"one": torch.tensor([1, 1, 1, 1, 1, 0]), "two": torch.ones(6, dtype=torch.long)}
    shown: list[tuple[int, int | None]] = []
    monkeypatch.setattr(
        color_report,
        "_attacked",
        lambda name, batch, radius, steps: (
            colours,
            torch.where(before[name] == 1, targets, wrong),
            torch.where(after[name] == 1, targets, wrong),
        ),
    )
    monkeypatch.setattr(
        color_report, "_swatches", lambda panel, colours, target, chosen: shown.append((target, chosen))
    )
    models: Any = [("one", "one"), ("two", "two")]
    rounds = made.rounds["test"][:6]
    draw_swatches(models, rounds, made.tokenizer, tmp_path / "swatches.png", radius=0.1, steps=2, count=5)
    first, second = (int(targets[n]) for n in (0, 1))
    assert shown == [
        (first, None),
        (first, int(wrong[0])),
        (first, first),
        (second, None),
        (second, second),
        (second, int(wrong[1])),
    ]
