"""The example on LXMERT: on the digits and on given files, killed and resumed, its options and what they refuse."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.lxmert_files import regions
from support.spawn import Script
from transformers import LxmertConfig, LxmertForPreTraining

from advvl.data.digits.as_lxmert import TABLE
from advvl.data.lxmert.answers import AnswerTable, write_answers
from advvl.data.lxmert.questions import VisualQuestion, write_questions
from advvl.data.lxmert.regions import write_regions
from advvl.errors import ConfigurationError
from advvl.experiments.cli import exit_status, main
from advvl.experiments.command_line import parse
from advvl.experiments.config import Layer, build
from advvl.experiments.lxmert import LXMERT, bert_adam, method_of, new_model
from advvl.experiments.lxmert_options import PRESETS, LxmertOptions
from advvl.experiments.runner import run
from advvl.models.lxmert.checkpoint import save_lxmert_checkpoint
from advvl.recipes.lxmert_adv import lxmert_adv

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "villa_lxmert.py"
VALUES = {
    "threads": 1,
    "jobs": 1,
    "device": "cpu",
    "model": {"hidden_size": 8, "x_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "data": {
        "train_images": 40,
        "train_questions": 32,
        "validation_questions": 12,
        "test_questions": 16,
        "captions": 8,
    },
    "finetune": {"epochs": 2, "batch_size": 16},
    "adversary": {"steps": 2},
    "evaluation": {
        "radii": [0.5],
        "text_radii": [0.5],
        "steps": 2,
        "step_fraction": 0.5,
        "restarts": 1,
        "examples": 8,
        "batch_size": 8,
    },
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "?", "net", "##s"]


def tiny(output: Path, **changes: object) -> LxmertOptions:
    return build(LxmertOptions, Layer("tiny", VALUES), Layer("test", {"output": str(output), **changes}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never killed, of two seeds."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(LXMERT, tiny(output, seeds=[0, 1]), progress=False)
    return output


def left(output: Path) -> dict[str, object]:
    """The weights as bytes, and the scores."""
    weights = {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.glob("seed-*/*.safetensors"))}
    scores = {
        str(path.relative_to(output)): json.loads(path.read_text())["scores"]
        for path in sorted(output.glob("seed-*/*.json"))
    }
    return weights | scores


def test_it_ends_with_one_table_of_clean_and_attacked_accuracy_with_intervals(whole: Path) -> None:
    table = (whole / "results.md").read_text()
    assert "Quick demo, 2 seeds: not evidence" in table
    assert "Clean: 16 test examples; attacked: the first 8 of them; seeds 0, 1." in table
    assert "mean of 2 seeds, t-interval over seeds" in table
    results = json.loads((whole / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == ["standard", "lxmert-adv"]
    conditions = [c["condition"] for c in results["methods"][0]["conditions"]]
    assert conditions == ["clean", "image 0", "image 0.5", "text 0", "text 0.5"]
    assert (whole / "accuracy_against_radius.png").stat().st_size > 0


@pytest.mark.slow
def test_killed_outright_and_resumed_it_ends_with_the_bits_of_a_run_never_killed(whole: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({**VALUES, "seeds": [0, 1]}))
    process = Script(EXAMPLE, "--config", config, "--output", output, folder=tmp_path)
    while process.poll() is None and not any(output.glob("seed-0/*.json")):
        time.sleep(0.01)
    process.kill()
    status, _, complaints = process.finish()
    assert any(output.glob("seed-0/*.json")), complaints
    assert status in (-signal.SIGKILL, 0)  # it may have been done before it was killed
    run(LXMERT, tiny(output, seeds=[0, 1], resume=True), progress=False)
    assert left(output) == left(whole)


def test_what_is_there_is_not_lost_unasked(whole: Path) -> None:
    assert exit_status(lambda: run(LXMERT, tiny(whole, seeds=[0, 1]))) == 2


def given(directory: Path, **changes: object) -> LxmertOptions:
    """Options for files as they are published, but tiny: 36 regions an image, VQA's questions, BERT's vocab.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    write_regions(directory / "train2014_obj36.tsv", (regions(f"train-{n}", seed=n) for n in range(6)))
    write_regions(directory / "val2014_obj36.tsv", (regions(f"val-{n}", seed=n) for n in range(3)))
    for name, image, count in (("train", "train", 18), ("nominival", "val", 6), ("minival", "val", 8)):
        write_questions(
            directory / f"{name}.json",
            [VisualQuestion(n, f"{image}-{n % 3}", "What is it?", {"net": 1.0, "nets": 0.3}) for n in range(count)],
        )
    write_answers(directory / TABLE[0], directory / TABLE[1], AnswerTable(("nets", "it", "net")))
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    files = {
        "regions": [str(directory / "train2014_obj36.tsv"), str(directory / "val2014_obj36.tsv")],
        "questions": [str(directory / "train.json"), str(directory / "nominival.json")],
        "test_questions": [str(directory / "minival.json")],
        "answers": str(directory),
        "tokenizer": str(directory / "vocab.txt"),
    }
    return tiny(directory / "out", **{**files, **changes})


def pretrained(path: Path, options: LxmertOptions, **changes: int) -> Path:
    """A checkpoint of LXMERT's pre-training under its published names, and the model it holds."""
    size = options.model
    sizes = {
        "vocab_size": len(WORDS),
        "visual_feat_dim": 5,
        "hidden_size": size.hidden_size,
        "l_layers": size.l_layers,
        "r_layers": size.r_layers,
        "x_layers": size.x_layers,
        "num_attention_heads": size.num_attention_heads,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": size.max_position_embeddings,
        "num_qa_labels": 7,
        "num_object_labels": 4,
        "num_attr_labels": 3,
    }
    save_lxmert_checkpoint(LxmertForPreTraining(LxmertConfig(**{**sizes, **changes})), path)
    return path


def test_it_takes_published_files_and_a_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "vqa"
    checkpoint = pretrained(tmp_path / "model_LXRT.pt", given(directory))
    options = given(directory, checkpoint=str(checkpoint))
    run(LXMERT, options, progress=False)
    results = json.loads((directory / "out" / "results.json").read_text())
    assert {fact["start"]["file"] for fact in results["training"]} == {checkpoint.name}
    assert {fact["updates"] for fact in results["training"]} == {2}  # of 24 questions in batches of 16, two epochs
    assert results["methods"][0]["conditions"][0]["accuracy"]["count"] == 8
    assert not (directory / "out" / "data").exists()


def test_a_model_begins_at_the_checkpoints_encoder_and_at_a_head_of_its_own(tmp_path: Path) -> None:
    options = given(tmp_path / "vqa")
    checkpoint = pretrained(tmp_path / "model_LXRT.pt", options)
    source, tested = LXMERT.data(options, tmp_path)
    assert (len(source), len(tested), len(source.answers)) == (24, 8, 3)
    began = new_model(options, source, 0, checkpoint)
    fresh = new_model(options, source, 0, None)
    saved = torch.load(checkpoint, weights_only=True)
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(began.lxmert.embeddings.word_embeddings.weight, saved[words])
    assert not torch.equal(fresh.lxmert.embeddings.word_embeddings.weight, saved[words])
    for one, other in zip(began.answer_head.parameters(), fresh.answer_head.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "val2014_obj36.tsv").unlink(), "val2014_obj36.tsv"),
        (
            lambda path: write_regions(path / "val2014_obj36.tsv", [regions("val-0", 35)]),
            "val2014_obj36.tsv, line 1: column num_boxes: expected 36, got 35",
        ),
        (lambda path: (path / "minival.json").write_text("[{}]"), "minival.json, entry 0: field 'question_id'"),
        (lambda path: (path / TABLE[0]).write_text('{"net": 0, "nets": 1, "it": 2}'), "UNITER numbers"),
        (lambda path: (path / "vocab.txt").write_text("[PAD]\n[UNK]"), r"got none of [CLS], [SEP], [MASK]"),
        (lambda path: (path / "vocab.txt").unlink(), "vocab.txt"),
        (lambda path: pretrained(path / "model.pt", given(path), hidden_size=12), "model.pt"),
    ],
    ids=[
        "no regions",
        "fewer regions",
        "questions",
        "UNITER's table",
        "vocabulary",
        "no vocabulary",
        "checkpoint of another size",
    ],
)
def test_a_file_that_will_not_do_ends_with_a_message_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, message: str
) -> None:
    options = given(tmp_path / "vqa", checkpoint=str(tmp_path / "vqa" / "model.pt"))
    pretrained(tmp_path / "vqa" / "model.pt", options)
    spoil(tmp_path / "vqa")  # type: ignore[operator]
    assert exit_status(lambda: run(LXMERT, options, progress=False)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regions": ["a.tsv"], "answers": "vqa"}, "got no questions, test_questions, tokenizer"),
        ({"adversary": {"text_step": None}}, "text_step or image_step, got neither"),
        ({"adversary": {"text_step": 0.0}}, "text_step"),
        ({"adversary": {"steps": 1}}, "steps"),
        ({"model": {"hidden_size": 10, "num_attention_heads": 4}}, "multiple of num_attention_heads=4"),
        ({"model": {"max_position_embeddings": 19}}, "max_position_embeddings"),
        ({"methods": ["villa"]}, "methods"),
        ({"seeds": [0, 0]}, "distinct"),
        ({"resume": True, "overwrite": True}, "resume or overwrite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(LxmertOptions, Layer("test", values))


def test_given_files_have_no_validation_part(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"evaluation\.split to be test"):
        given(tmp_path, evaluation={"split": "validation"})


def test_the_published_preset_is_the_published_recipe(tmp_path: Path) -> None:
    options = parse(LxmertOptions, ["--preset", "published"], presets=PRESETS)
    assert repr(method_of(options.adversary)) == repr(lxmert_adv("vqa"))
    (group,) = bert_adam(options)(torch.nn.Linear(2, 2)).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-5, (0.9, 0.999), 1e-6, 0.01)
    assert (options.finetune.batch_size, options.finetune.epochs, options.finetune.clip) == (32, 4, 5.0)
    sizes, published = options.model, LxmertConfig()
    for name in ("hidden_size", "l_layers", "r_layers", "x_layers", "num_attention_heads", "intermediate_size"):
        assert getattr(sizes, name) == getattr(published, name)
    assert sizes.max_position_embeddings == published.max_position_embeddings
    assert sizes.dropout == published.hidden_dropout_prob == published.attention_probs_dropout_prob


@pytest.mark.slow
def test_the_command_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(VALUES))
    output = tmp_path / "out"
    assert main(["villa-lxmert", "--config", str(tmp_path / "tiny.yaml"), "--output", str(output)]) == 0
    assert "Quick demo, one seed: not evidence" in capsys.readouterr().out
    assert (output / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--preset", "evidence"], "evidence"), (["--adversary.text_stepp", "1"], "nearest to --adversary.text_stepp is")],
)
def test_the_command_refuses_what_it_does_not_know(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["villa-lxmert", "--output", str(tmp_path / "out"), *arguments]))
    assert message in capsys.readouterr().err


def test_every_preset_is_read() -> None:
    for name in PRESETS:
        assert parse(LxmertOptions, ["--preset", name], presets=PRESETS).preset == name


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40
