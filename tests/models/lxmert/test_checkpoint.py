"""LXMERT's checkpoints: every name in use is read, what is written has the published names, heads begin from answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compare import same
from support.golden_cases import tensors
from support.lxmert_batches import lxmert_batch, lxmert_config
from torch import Tensor, nn
from transformers import LxmertConfig, LxmertForPreTraining, LxmertForQuestionAnswering, LxmertModel

from advvl.errors import CheckpointError, ConfigurationError
from advvl.models.lxmert.answer_head import load_lxmert_answers, plain_answer
from advvl.models.lxmert.checkpoint import (
    LXMERT_PRETRAINING_HEADS,
    load_lxmert_checkpoint,
    lxmert_name,
    original_name,
    save_lxmert_checkpoint,
)
from advvl.tasks.lxmert.nlvr2 import LxmertForNLVR2
from advvl.tasks.lxmert.vqa import LxmertForVQA

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
GOLDEN = tensors("lxmert_vqa", "lxmert_vqa")  # a state dict that the published code wrote
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "l_layers": 2,
    "visual_feat_dim": 40,
    "num_qa_labels": 17,
    "max_position_embeddings": 32,
}


def build(kind: Any, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(lxmert_config(**CONFIG | options)).double().eval()


def values(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def saved(tmp_path: Path, state: Any, name: str = "checkpoint.pth") -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


def read(path: Path) -> State:
    loaded: State = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return loaded


def in_transformers(state: State) -> State:
    """The golden state under transformers' names, renamed here by hand."""
    return {
        name.replace("model.bert.", "lxmert.") if name.startswith("model.") else f"answer_head.{name}": value
        for name, value in state.items()
    }


def from_pretraining(seed: int = 3, answers: int = 9) -> State:
    """A pre-training checkpoint under the published names, made of a model of transformers."""
    state = values(build(LxmertForPreTraining, seed, num_qa_labels=answers))
    return {f"bert.{n.removeprefix('lxmert.')}" if n.startswith("lxmert.") else n: v for n, v in state.items()}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def old_norms(state: State) -> State:
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for n, v in state.items()
    }


@pytest.mark.parametrize("kind", [LxmertForVQA, LxmertForQuestionAnswering], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "disguise",
    [
        pytest.param(dict, id="as-published"),
        pytest.param(lambda s: {f"lxrt_encoder.{n}" if "bert" in n else n: v for n, v in s.items()}, id="lxrt-encoder"),
        pytest.param(lambda s: {n.removeprefix("model."): v for n, v in s.items()}, id="bert"),
        pytest.param(prefixed("module."), id="data-parallel"),
        pytest.param(
            lambda s: {n.replace("model.", "lxrt_encoder.model.module."): v for n, v in s.items()}, id="in-it"
        ),
        pytest.param(in_transformers, id="transformers"),
        pytest.param(
            lambda s: {n.removeprefix("lxmert."): v for n, v in in_transformers(s).items()}, id="bare-encoder"
        ),
        pytest.param(old_norms, id="gamma-and-beta"),
        pytest.param(lambda s: s | {"model.bert.embeddings.position_ids": torch.arange(32)[None]}, id="buffer"),
    ],
)
def test_every_name_in_use_is_read(tmp_path: Path, kind: Any, disguise: Callable[[State], State]) -> None:
    model = build(kind)
    report = load_lxmert_checkpoint(model, saved(tmp_path, disguise(GOLDEN)))
    same(model.state_dict(), in_transformers(GOLDEN))
    assert (report.missing, report.unexpected) == ((), ())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_task_is_written_under_the_published_names_to_the_same_bits(tmp_path: Path, suffix: str) -> None:
    model = build(LxmertForVQA)
    load_lxmert_checkpoint(model, saved(tmp_path, GOLDEN))
    path = save_lxmert_checkpoint(model, tmp_path / f"task{suffix}")
    same({name.removeprefix("lxrt_encoder."): value for name, value in read(path).items()}, GOLDEN)
    assert {name.partition(".")[0] for name in read(path)} == {"lxrt_encoder", "logit_fc"}
    same(read(save_lxmert_checkpoint(build_from(path), tmp_path / f"again{suffix}")), read(path))


def build_from(path: Path) -> Any:
    model = build(LxmertForQuestionAnswering, seed=2)
    load_lxmert_checkpoint(model, path)
    return model


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pretraining_is_written_under_the_published_names_to_the_same_bits(tmp_path: Path, suffix: str) -> None:
    original, model = from_pretraining(), build(LxmertForPreTraining, num_qa_labels=9)
    path = tmp_path / f"original{suffix}"
    if suffix == ".safetensors":
        save_file({name: value.clone() for name, value in original.items()}, path)
    else:
        saved(tmp_path, original, path.name)
    load_lxmert_checkpoint(model, path)
    assert model.cls.predictions.decoder.weight is model.lxmert.embeddings.word_embeddings.weight
    same(read(save_lxmert_checkpoint(model, tmp_path / f"again{suffix}")), original)


def test_a_bare_encoder_is_read_and_written(tmp_path: Path) -> None:
    model, original = build(LxmertModel), from_pretraining()
    load_lxmert_checkpoint(model, saved(tmp_path, original), encoder_only=True)
    encoder = {name: value for name, value in original.items() if name.startswith("bert.")}
    same(read(save_lxmert_checkpoint(model, tmp_path / "bare.safetensors")), encoder)


@pytest.mark.parametrize("kind", [LxmertForVQA, LxmertForNLVR2], ids=lambda kind: kind.__name__)
def test_fine_tuning_begins_from_the_encoder_of_pretraining(tmp_path: Path, kind: Any) -> None:
    model, original = build(kind), from_pretraining()
    before = values(model)
    with pytest.raises(CheckpointError, match=r"answer_head\.logit_fc\.\d\.weight: expected shape"):
        load_lxmert_checkpoint(model, saved(tmp_path, original), allow_unexpected=LXMERT_PRETRAINING_HEADS)
    same(model.state_dict(), before)
    report = load_lxmert_checkpoint(model, saved(tmp_path, original), encoder_only=True)
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        assert torch.equal(value, before[name] if part == "answer_head" else original[f"bert.{rest}"]), name
    assert set(report.missing) == {name for name in before if name.startswith("answer_head")}
    assert set(report.unexpected) == {name for name in original if not name.startswith("bert.")}


def test_a_file_without_an_encoder_is_refused(tmp_path: Path) -> None:
    heads = {name: value for name, value in GOLDEN.items() if name.startswith("logit_fc")}
    with pytest.raises(CheckpointError, match=r"missing lxmert\.embeddings"):
        load_lxmert_checkpoint(build(LxmertForVQA), saved(tmp_path, heads), encoder_only=True)


@pytest.mark.parametrize("pattern", ["logit_fc", "answer_head.*", "answer_head"])
def test_a_head_may_be_missing_under_any_of_its_names(tmp_path: Path, pattern: str) -> None:
    model, encoder = build(LxmertForVQA), {n: v for n, v in GOLDEN.items() if n.startswith("model")}
    with pytest.raises(CheckpointError, match=r"missing answer_head\.logit_fc\.0\.weight"):
        load_lxmert_checkpoint(model, saved(tmp_path, encoder))
    report = load_lxmert_checkpoint(model, saved(tmp_path, encoder), allow_missing=[pattern])
    assert len(report.missing) == 6


QUERY = "model.bert.encoder.x_layers.0.visual_attention.att.query.weight"
HERE = "lxmert.encoder.x_layers.0.visual_attention.att.query.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if n != QUERY}, f"missing {HERE}"),
        (lambda s: s | {"rank.weight": torch.ones(1)}, "unexpected rank.weight"),
        (lambda s: s | {QUERY: s[QUERY][:40]}, rf"{HERE}: expected shape \(48, 48\), found \(40, 48\)"),
        (
            lambda s: s | {f"lxrt_encoder.{QUERY}": s[QUERY] + 1},
            f"differs from another tensor that is also called {HERE}",
        ),
        (
            lambda s: s | {"logit_fc.3.weight": s["logit_fc.3.weight"][:3]},
            r"expected shape \(17, 96\), found \(3, 96\)",
        ),
    ],
    ids=["missing", "extra", "shape", "two-names-that-differ", "answers"],
)
def test_what_does_not_fit_is_named_and_nothing_changes(
    tmp_path: Path, spoil: Callable[[State], State], message: str
) -> None:
    model = build(LxmertForVQA)
    before = values(model)
    with pytest.raises(CheckpointError, match=message):
        load_lxmert_checkpoint(model, saved(tmp_path, spoil(GOLDEN)))
    same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "here", "task", "pretraining"),
    [
        (
            "module.lxrt_encoder.model.module.bert.pooler.dense.bias",
            "lxmert.pooler.dense.bias",
            "lxrt_encoder.model.bert.pooler.dense.bias",
            "bert.pooler.dense.bias",
        ),
        (
            "encoder.layer.0.x",
            "lxmert.encoder.layer.0.x",
            "lxrt_encoder.model.bert.encoder.layer.0.x",
            "bert.encoder.layer.0.x",
        ),
        ("logit_fc.3.bias", "answer_head.logit_fc.3.bias", "logit_fc.3.bias", "answer_head.logit_fc.3.bias"),
        ("cls.predictions.bias", "cls.predictions.bias", "cls.predictions.bias", "cls.predictions.bias"),
    ],
)
def test_names(name: str, here: str, task: str, pretraining: str) -> None:
    assert lxmert_name(name) == here
    assert lxmert_name(here) == here
    assert original_name(name, of_task=True) == task
    assert original_name(here, of_task=False) == pretraining
    assert lxmert_name(task) == lxmert_name(pretraining) == here


def test_every_name_of_the_published_architecture_has_its_place() -> None:
    with torch.device("meta"):
        model = LxmertForPreTraining(LxmertConfig())
    for name in model.state_dict():
        for of_task in (True, False):
            assert lxmert_name(original_name(name, of_task=of_task)) == name


PRETRAINING = ("yes", "2", "man", "gray", "on table", "no", "10", "tree", "white")
TASK = ("no", "the man", "Two", "zebra", "grey.", "A tree.", "two", "on the table", "man")
MATCHED = {
    "no": "no",
    "the man": "man",
    "Two": "2",
    "grey.": "gray",
    "A tree.": "tree",
    "two": "2",
    "man": "man",
}


@pytest.mark.parametrize("kind", [LxmertForVQA, LxmertForQuestionAnswering], ids=lambda kind: kind.__name__)
def test_an_answer_head_begins_from_the_answers_of_pretraining(tmp_path: Path, kind: Any) -> None:
    model, original = build(kind, num_qa_labels=len(TASK)), from_pretraining()
    report = load_lxmert_answers(model, saved(tmp_path, original), pretraining_answers=PRETRAINING, answers=TASK)
    assert report.matched == MATCHED
    assert report.unmatched == ("zebra", "on the table")
    weight, bias = original["answer_head.logit_fc.3.weight"], original["answer_head.logit_fc.3.bias"]
    last = model.answer_head.logit_fc[3]
    for row, answer in enumerate(TASK):
        if answer in MATCHED:
            source = PRETRAINING.index(MATCHED[answer])
            assert torch.equal(last.weight[row], weight[source])
            assert torch.equal(last.bias[row], bias[source])
        else:
            assert not last.weight[row].any()
            assert not last.bias[row].any()
    assert torch.equal(model.answer_head.logit_fc[0].weight, original["answer_head.logit_fc.0.weight"])
    assert torch.equal(model.lxmert.pooler.dense.weight, original["bert.pooler.dense.weight"])


def test_known_answers_are_scored_as_pretraining_scored_them(tmp_path: Path) -> None:
    before, after = build(LxmertForPreTraining, num_qa_labels=9), build(LxmertForVQA, num_qa_labels=3)
    path = save_lxmert_checkpoint(before, tmp_path / "pretrained.safetensors")
    load_lxmert_answers(after, path, pretraining_answers=PRETRAINING, answers=["the tree", "zebra", "yes"])
    batch = lxmert_batch() | {"visual_feats": torch.randn(3, 5, 40, dtype=torch.float64)}
    scores, known = after(**batch).logits, before(**batch).question_answering_score
    assert torch.equal(scores[:, 1], torch.zeros(3).double())
    torch.testing.assert_close(scores[:, [0, 2]], known[:, [7, 0]], rtol=1e-12, atol=1e-12)


def test_answers_that_do_not_fit_the_model_or_the_checkpoint_are_refused(tmp_path: Path) -> None:
    model, path = build(LxmertForVQA, num_qa_labels=3), saved(tmp_path, from_pretraining())
    before = values(model)
    with pytest.raises(CheckpointError, match="the 8 answers of pre-training, got 9"):
        load_lxmert_answers(model, path, pretraining_answers=PRETRAINING[:8], answers=["yes", "no", "2"])
    with pytest.raises(ConfigurationError, match="each of the 2 answers, got a LxmertForVQA with 3"):
        load_lxmert_answers(model, path, pretraining_answers=PRETRAINING, answers=["yes", "no"])
    with pytest.raises(ConfigurationError, match="LxmertModel with no answer head"):
        load_lxmert_answers(build(LxmertModel), path, pretraining_answers=PRETRAINING, answers=["yes", "no"])
    same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("Yes.", "yes"),
        ("  The  cat ", "cat"),
        ("an apple.", "apple"),
        ("a", "a"),
        ("the", "the"),
        ("another", "another"),
        ("seven", "7"),
        ("a ten", "10"),
        ("seven dogs", "seven dogs"),
        ("grey", "gray"),
        ("2.5", "2.5"),
        ("", ""),
    ],
)
def test_answers_are_spelled_as_in_pretraining(answer: str, plain: str) -> None:
    assert plain_answer(answer) == plain
    assert plain_answer(plain) == plain


def test_the_file_of_another_kind_of_model_is_told_as_such(tmp_path: Path) -> None:
    torch.save({"uniter.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"has none of its names, but uniter.*; see which of advvl.models reads it"
    ):
        load_lxmert_checkpoint(LxmertForVQA(LxmertConfig(**CONFIG)), tmp_path / "other.pt")
