"""`advvl train`, `advvl evaluate` and `advvl predict`, by their command lines, on small databases of every task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.task_databases import (
    META,
    SMALL,
    fields,
    options_of,
    values,
    write_databases,
    write_pictures,
    write_records,
)

from advvl.data.uniter.text_writer import write_texts
from advvl.evaluation.statistics import bootstrap_interval, proportion_interval
from advvl.experiments.cli import main
from advvl.experiments.task_scores import Scored
from advvl.experiments.train import train
from advvl.experiments.train_setup import method_of, model_of, optimizer_of, optimizer_options, training_of
from advvl.fit.loop import fit
from advvl.models.uniter.checkpoint import load_checkpoint, save_checkpoint
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.retrieval import HardestSource

TASKS = ("vqa", "ve", "nlvr2", "vcr", "retrieval", "hard-retrieval", "referring", "pretraining", "vcr-pretraining")


def configured(task: str, root: Path, **more: Any) -> str:
    """Write the databases of a task, and the file of its options."""
    write_databases(options_of(task, root, **more), root)
    path = root / f"{task}.yaml"
    path.write_text(yaml.safe_dump(values(task, root, **more)))
    return str(path)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    model = torch.load(path, weights_only=True)["model"]
    assert isinstance(model, dict)
    return model


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_scored_and_predicted_by_command(task: str, tmp_path: Path, capsys: Any) -> None:
    config = configured(task, tmp_path)
    assert main(["train", config]) == 0
    out = tmp_path / "out"
    assert {"configuration.yaml", "model.safetensors", "best.safetensors"} <= {path.name for path in out.iterdir()}
    assert list(json.loads((out / "training-scores.json").read_text())) == ["2", "4"]
    said = capsys.readouterr()
    assert "update 4 of 4, loss" in said.err
    assert "after 4 updates:" in said.err
    assert main(["evaluate", config, "--checkpoint", str(out / "model.safetensors")]) == 0
    scores = json.loads((out / "scores-val.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    for line, (name, value) in zip(printed, scores.items(), strict=False):
        assert line.startswith(f"{name:16} {value:.4f}")
        assert ("95 % " in line and " interval over " in line) is not (
            name.endswith("loss") or name == "mean_recall" or "pretraining" in task
        )
    assert all(0 <= value <= 1 for name, value in scores.items() if not name.endswith("loss"))
    if "retrieval" not in task:  # whose training is scored on a few images
        assert scores == json.loads((out / "training-scores.json").read_text())["4"]
    status = main(["predict", config])
    said = capsys.readouterr()
    if task == "vqa" or "pretraining" in task:
        assert status == 2
        assert ("data.answers" if task == "vqa" else "expected a task that predicts") in said.err
        return
    assert status == 0, said.err
    assert len(list(out.glob("predictions-val.*"))) == 1


def test_vqas_answers_are_written_in_words_by_question(tmp_path: Path, capsys: Any) -> None:
    config = configured("vqa", tmp_path, data={"answers": "answers.json"}, optimizer={"updates": 1, "warmup": 0})
    (tmp_path / "answers.json").write_text(json.dumps({"two": 2, "none": 0, "one": 1}))
    assert main(["train", config]) == 0
    assert main(["predict", config]) == 0
    found = json.loads((tmp_path / "out" / "predictions-val.json").read_text())
    assert [one["question_id"] for one in found] == list(range(12))
    assert {one["answer"] for one in found} <= {"none", "one", "two"}
    right = sum(one["answer"] == ["none", "one", "two"][one["question_id"] % 3] for one in found) / 12
    assert main(["evaluate", config]) == 0
    assert json.loads((tmp_path / "out" / "scores-val.json").read_text()) == {"accuracy": pytest.approx(right)}
    wilson = proportion_interval(12 * right, 12)
    assert f"[{wilson.low:.4f}, {wilson.high:.4f}] 95 % Wilson interval over 12 examples" in capsys.readouterr().out


def test_soft_scores_have_the_interval_of_a_bootstrap_and_shares_wilsons() -> None:
    soft = [0.3, 1.0, 0.6, 0.0]
    found = Scored({"accuracy": 0.475, "qa": 0.75, "loss": 2.0}, counts={"qa": 4}, each={"accuracy": soft}).intervals()
    assert found == {"qa": proportion_interval(3, 4), "accuracy": bootstrap_interval(soft)}


@pytest.mark.parametrize("task", ["vqa", "hard-retrieval"])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_never_was(task: str, tmp_path: Path) -> None:
    more = {"adversary": {"modalities": ["text"]}} if task == "vqa" else {}
    options = options_of(task, tmp_path, **more)
    write_databases(options, tmp_path)
    train(options, progress=False)
    whole = tensors(tmp_path / "out" / "checkpoints" / "update-00000004.pt")
    for name in ("update-00000004.pt", "update-00000002.pt"):
        (tmp_path / "out" / "checkpoints" / name).rename(tmp_path / name)
    (tmp_path / "update-00000002.pt").rename(tmp_path / "out" / "checkpoints" / "update-00000002.pt")
    train(options_of(task, tmp_path, resume=True, **more), progress=False)
    again = tensors(tmp_path / "out" / "checkpoints" / "update-00000004.pt")
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_what_is_added_up_as_published_moves_as_the_mean_does(tmp_path: Path) -> None:
    """A sum of n micro-batches under clip and epsilon is their mean under an n-th of both."""
    options = options_of("vqa", tmp_path, optimizer={"summed": 5, "clip": 0.5, "epsilon": 1e-3, "updates": 3})
    write_databases(options, tmp_path)
    found = {}
    for how in ("mean", "sum"):
        model = model_of(options).double()
        training = training_of(options, model)
        parts = training.sampler.parts(0, 1)  # type: ignore[union-attr]
        optimizer = optimizer_of(options, model)
        if how == "sum":
            for group in optimizer.param_groups:
                group["eps"] = 1e-3
        factor, clip = (5, 0.5) if how == "sum" else (1, optimizer_options(options).clip)
        for _ in range(3):
            for part in parts:
                batch = training.source.batch(part, torch.Generator().manual_seed(0))
                batch = {name: one.double() if one.is_floating_point() else one for name, one in batch.items()}
                (factor * model.eval()(**batch).loss.mean() / len(parts)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        found[how] = model.state_dict()
    torch.testing.assert_close(found["mean"], found["sum"], rtol=1e-6, atol=1e-9)


def test_the_groups_of_weight_decay_are_the_published_ones(tmp_path: Path) -> None:
    options = options_of("vqa", tmp_path, optimizer={"head_rate": 10.0, "learning_rate": 1e-4})
    model = model_of(options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        (round(group["lr"] / 1e-4), group["weight_decay"]): {names[one] for one in group["params"]}
        for group in optimizer_of(options, model).param_groups
    }
    assert set(groups) == {(1, 0.01), (1, 0.0), (10, 0.01), (10, 0.0)}
    assert {"vqa_output.0.weight", "vqa_output.2.weight"} <= groups[10, 0.01]
    assert {"uniter.img_embeddings.img_layer_norm.weight", "uniter.pooler.dense.weight"} <= groups[1, 0.01]
    assert {"uniter.embeddings.LayerNorm.weight", "uniter.pooler.dense.bias"} <= groups[1, 0.0]
    assert groups[10, 0.0] == {f"vqa_output.{layer}.bias" for layer in (0, 2, 3)}


def test_half_of_pretraining_is_plain_and_regions_are_always_plain(tmp_path: Path) -> None:
    """Up to its first adversarial update a run of VILLA's stage one has the bits of a standard one."""
    mixture = {"mixture": {"mlm": [1], "itm": [1], "mrfr": [1], "mrc_kl": [1]}}
    adversary = {"adversary": {"modalities": ["text", "image"], "order": "in turn", "clean_weight": 0.5, "start": 3}}
    plain = options_of("pretraining", tmp_path, **mixture)
    villa = options_of("pretraining", tmp_path, **mixture, **adversary)
    write_databases(plain, tmp_path)
    training = training_of(plain, model_of(plain))
    source, sampler = training.source, training.sampler
    assert sampler is not None
    losses = {}
    for name, options in (("plain", plain), ("villa", villa)):
        model = model_of(options)
        training = training_of(options, model)
        losses[name] = fit(
            model,
            training.source,
            options=optimizer_options(options),
            seed=42,
            updates=8,
            sampler=training.sampler,
            method=method_of(options),
            adversarial_tasks=("mlm", "itm"),
            adversarial_from=options.adversary.start,
            weighting="micro-batches",
            accumulate=2,
        ).losses
    tasks = [source.batch(sampler.parts(update, 42)[0], torch.Generator())["task"] for update in range(8)]
    first = next(update for update in range(3, 8) if tasks[update] in ("mlm", "itm"))
    assert losses["plain"][:first] == losses["villa"][:first]
    assert losses["plain"][first] != losses["villa"][first]


def test_pretraining_starts_from_a_bert_and_says_what_is_drawn(tmp_path: Path, capsys: Any) -> None:
    config = configured("pretraining", tmp_path, start="init.pt", optimizer={"updates": 1, "warmup": 0})
    sizes = dict(SMALL)
    state = UniterForPretraining(UniterConfig(**sizes)).state_dict()
    torch.save(
        {f"bert{name.removeprefix('uniter')}": one for name, one in state.items() if ".e" in name}, tmp_path / "x.pt"
    )
    words = {name.replace("uniter.", "bert."): one for name, one in state.items() if name.startswith("uniter.")}
    torch.save({name: one for name, one in words.items() if ".img_" not in name}, tmp_path / "init.pt")
    assert main(["train", config]) == 0
    said = capsys.readouterr().err
    assert "drawn from the seed, since the file lacks them: " in said
    assert "uniter.img_embeddings.pos_linear.weight" in said
    assert "uniter.encoder" not in said


def test_a_fine_tuning_starts_from_pretraining(tmp_path: Path) -> None:
    config = configured("vqa", tmp_path, start="start.safetensors", optimizer={"updates": 1, "warmup": 0})
    torch.manual_seed(5)
    first = UniterForPretraining(UniterConfig(**SMALL))
    save_checkpoint(first, tmp_path / "start.safetensors")
    assert main(["train", config, "--optimizer.learning_rate", "1e-9"]) == 0
    model = model_of(options_of("vqa", tmp_path))
    load_checkpoint(model, tmp_path / "out" / "model.safetensors")
    query = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(model.uniter.get_parameter(query), first.uniter.get_parameter(query), rtol=0, atol=1e-7)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no database": ({"data": {"train_texts": ["lost.db"]}}, "lost.db"),
    "no checkpoint": ({"start": "lost.pt"}, "lost.pt"),
    "no images": ({"data": {"train_images": ["lost"]}}, "lost"),
    "other features": ({"model": {"img_dim": 7}}, "give model.img_dim"),
    "other words": ({"model": {"vocab_size": 50}}, "give model.vocab_size"),
    "odd processes": ({"sampling": {"tokens": None}}, "expected sampling.tokens or sampling.batch_size"),
    "no images for texts": ({"data": {"train_images": []}}, "expected a database of images for each of 1 train_texts"),
    "warm-up": ({"optimizer": {"warmup": 4}}, "expected warmup below updates = 4, got 4"),
    "a long text": ({"sampling": {"tokens": 8}}, "expected examples of at most 8 tokens"),
    "evaluation": ({"checkpoint": "x"}, "expected start=… to train from"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_comes_before_the_first_update(case: str, tmp_path: Path, capsys: Any) -> None:
    more, message = BAD[case]
    write_databases(options_of("vqa", tmp_path), tmp_path)
    path = tmp_path / "vqa.yaml"
    path.write_text(yaml.safe_dump(values("vqa", tmp_path, **more)))
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "update 1" not in said
    assert not list((tmp_path / "out").rglob("*.pt"))


@pytest.mark.parametrize("task", ["vqa", "vcr"])
def test_a_word_that_the_model_does_not_know_is_named(task: str, tmp_path: Path, capsys: Any) -> None:
    words = 97 + 81 * (task == "vcr")
    config = configured(task, tmp_path, optimizer={"updates": 40})
    with write_texts(tmp_path / "odd.db", META) as texts:
        for number, highest in enumerate([words - 1] * 6 + [words]):
            texts.add(f"t-{number}", {**fields(task, number), "input_ids": [7, highest]})
    assert main(["train", config, "--data.train_texts", "odd.db"]) == 2
    said = capsys.readouterr().err
    assert f"odd.db, record 't-6': input_ids: expected ids below the model's {words} words, got {words}" in said
    assert "give model.vocab_size" in said


def test_databases_of_different_tokenisers_are_refused(tmp_path: Path, capsys: Any) -> None:
    config = configured("vqa", tmp_path)
    with write_texts(tmp_path / "other.db", type(META)(7, 2, 3, (8, 97), 5, "another")) as texts:
        texts.add("0", {"input_ids": [9], "img_fname": "i0.npz"})
    assert main(["train", config, "--data.val_texts", "other.db"]) == 2
    assert "expected databases of one tokenizer" in capsys.readouterr().err


def test_another_runs_directory_is_refused_and_kept(tmp_path: Path, capsys: Any) -> None:
    config = configured("ve", tmp_path, optimizer={"updates": 1, "warmup": 0})
    assert main(["train", config]) == 0
    assert main(["train", config]) == 2
    assert "pass --resume to keep or --overwrite to lose" in capsys.readouterr().err
    assert main(["train", config, "--seed", "7"]) == 2
    assert "seed" in capsys.readouterr().err
    assert main(["train", config, "--resume"]) == 0
    assert main(["train", config, "--seed", "7", "--overwrite"]) == 0


def test_a_file_that_is_not_the_models_is_no_checkpoint_to_score(tmp_path: Path, capsys: Any) -> None:
    config = configured("vqa", tmp_path)
    assert main(["evaluate", config]) == 2
    assert "expected a file of weights at" in capsys.readouterr().err
    save_checkpoint(UniterForPretraining(UniterConfig(**SMALL)), tmp_path / "first.safetensors")
    assert main(["evaluate", config, "--checkpoint", str(tmp_path / "first.safetensors")]) == 2
    assert "vqa_output" in capsys.readouterr().err


def test_help_shows_the_options_with_their_defaults(capsys: Any) -> None:
    for name in ("train", "evaluate", "predict"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        said = capsys.readouterr().out
        assert f"usage: advvl {name} [CONFIG]" in said
        assert "--data-dir" in said
        assert "--adversary.kl_weight" in said
        assert "YAML or JSON file of options" in said
    assert main(["--help"]) == 0
    assert "train a task of UNITER on its databases" in capsys.readouterr().out


def test_a_recall_over_all_images_is_that_of_plain_scores(tmp_path: Path) -> None:
    """The score of a pair does not depend on what it is batched with."""
    config = configured("retrieval", tmp_path)
    assert main(["train", config]) == 0
    small, large = (json.loads(_scored(config, tmp_path, tokens)) for tokens in (30, 9999))
    assert small == large
    assert set(small) >= {"mean_recall", "text_recall_1", "image_recall_10"}
    assert math.isclose(small["image_recall_10"], 1.0)


def test_recall_is_counted_as_published_where_asked(tmp_path: Path) -> None:
    config = configured("retrieval", tmp_path)
    save_checkpoint(model_of(options_of("retrieval", tmp_path)), tmp_path / "out" / "best.safetensors")
    plain, published = (
        json.loads(_scored(config, tmp_path, 9999, *more)) for more in ((), ("--evaluation.published_recall",))
    )
    assert {name: published[name] for name in plain if "text" in name} == {
        name: plain[name] for name in plain if "text" in name
    }
    assert math.isclose(published["image_recall_10"], 1 + 10 / 12)  # the first ten of twelve texts count twice


def test_texts_of_an_image_are_laid_out_as_published_where_asked(tmp_path: Path) -> None:
    found = {}
    for published in (False, True):
        options = options_of("hard-retrieval", tmp_path, sampling={"published_layout": published})
        write_databases(options, tmp_path)
        source = training_of(options, model_of(options)).source
        assert isinstance(source, HardestSource)
        found[published] = [
            source.candidates.batch([row], torch.Generator().manual_seed(0))["gather_index"].tolist()
            for row in range(len(source))
        ]
    assert found[False][::2] == found[True][::2]  # a text with other images
    assert found[False][1::2] != found[True][1::2]


def _scored(config: str, root: Path, tokens: int, *more: str) -> str:
    assert main(["evaluate", config, "--evaluation.tokens", str(tokens), *more]) == 0
    return (root / "out" / "scores-val.json").read_text()


def test_pictures_and_records_are_those_of_the_task(tmp_path: Path) -> None:
    write_records(tmp_path / "a.db", "ve", 2)
    write_pictures(tmp_path / "b", options_of("ve", tmp_path).data.limits, ["i0.npz"])
    assert (tmp_path / "b" / "feat_th0.2_max100_min10").is_dir()
