"""Checkpoints: every name in use is read, what does not fit is named, and a refused file changes nothing."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compare import same
from support.golden_cases import tensors
from support.uniter_batches import uniter_batch
from torch import Tensor, nn

from advvl.errors import CheckpointError, ConfigurationError, OutputDirectoryError
from advvl.models.uniter.checkpoint import PRETRAINING_HEADS, load_checkpoint, official_name, save_checkpoint
from advvl.models.uniter.model import UniterConfig, UniterModel
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA

pytestmark = pytest.mark.slow

WORDS = "uniter.embeddings.word_embeddings.weight"
TIED = ("cls.predictions.decoder.weight", "feat_regress.weight")
OFFICIAL = tensors("uniter_pretrain", "uniter_pretrain")  # a state dict that the published code wrote


def pretraining(seed: int = 1) -> UniterForPretraining:
    torch.manual_seed(seed)
    return UniterForPretraining(UniterConfig.tiny()).double()


def vqa(seed: int = 1) -> UniterForVQA:
    torch.manual_seed(seed)
    return UniterForVQA(UniterConfig.tiny(), num_answers=5).double()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def saved(tmp_path: Path, state: Any, name: str = "checkpoint.pt") -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


def padded(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    state = dict(state)
    for name in (WORDS, TIED[0], "cls.predictions.bias"):
        state[name] = torch.cat([state[name], state[name].new_zeros(rows, *state[name].shape[1:])])
    return state


def as_old_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As early conversions name it: `bert.`, gamma and beta, a padded vocabulary, a buffer of positions."""

    def old(name: str) -> str:
        name = name.replace("uniter.", "bert.")
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    renamed = {old(name): value for name, value in padded(state, 7).items()}
    return renamed | {"bert.embeddings.position_ids": torch.arange(32)[None]}


@pytest.mark.parametrize(
    "disguise",
    [
        pytest.param(dict, id="official"),
        pytest.param(as_old_bert, id="bert-gamma-beta-padded"),
        pytest.param(lambda s: padded(s, 200), id="padded-with-many-zeros"),
        pytest.param(lambda s: {f"module.{n}": t for n, t in s.items()}, id="wrapped"),
        pytest.param(lambda s: {n.removeprefix("uniter."): t for n, t in s.items()}, id="bare"),
        pytest.param(lambda s: {n: t for n, t in s.items() if n not in TIED}, id="tied-weights-once"),
        pytest.param(
            lambda s: {n: t for n, t in s.items() if n != WORDS},
            id="tied-weights-under-the-other-name",
        ),
        pytest.param(
            lambda s: s | {"cls.predictions.decoder.bias": s["cls.predictions.bias"]}, id="bias-under-two-names"
        ),
    ],
)
def test_every_name_in_use_is_read(tmp_path: Path, disguise: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    model = pretraining()
    report = load_checkpoint(model, saved(tmp_path, disguise(OFFICIAL)))
    same(model.state_dict(), OFFICIAL)
    assert (report.missing, report.unexpected) == ((), ())
    assert model.cls.predictions.decoder.weight is model.uniter.embeddings.word_embeddings.weight
    assert model.feat_regress.weight is model.uniter.img_embeddings.img_linear.weight


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "build", [pretraining, vqa, lambda seed=1: vqa(seed).uniter], ids=["pretraining", "vqa", "bare"]
)
def test_what_is_saved_is_read_back(tmp_path: Path, build: Callable[..., nn.Module], suffix: str) -> None:
    before, after = build(1), build(2)
    path = save_checkpoint(before, tmp_path / f"model{suffix}")
    load_checkpoint(after, path)
    same(after.state_dict(), values(before))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_saved_names_are_the_official_ones(tmp_path: Path, suffix: str) -> None:
    path = save_checkpoint(pretraining(), tmp_path / f"model{suffix}")
    written = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert written.keys() == OFFICIAL.keys()
    bare = save_checkpoint(vqa().uniter, tmp_path / f"bare{suffix}")
    written = load_file(bare) if suffix == ".safetensors" else torch.load(bare, weights_only=True)
    assert written.keys() == {name for name in OFFICIAL if name.startswith("uniter.")}


def test_official_pretraining_starts_vqa_and_leaves_its_head_alone(tmp_path: Path) -> None:
    path, model = saved(tmp_path, OFFICIAL), vqa()
    before = values(model)
    report = load_checkpoint(model, path, allow_missing=["vqa_output.*"], allow_unexpected=PRETRAINING_HEADS)
    head = {name: value for name, value in before.items() if name.startswith("vqa_output")}
    encoder = {name: value for name, value in OFFICIAL.items() if name.startswith("uniter")}
    same(model.state_dict(), encoder | head)
    assert set(report.missing) == set(head)
    assert set(report.unexpected) == OFFICIAL.keys() - encoder.keys()


def test_a_bare_model_takes_the_encoder_of_a_checkpoint(tmp_path: Path) -> None:
    model = UniterModel(UniterConfig.tiny()).double()
    load_checkpoint(model, saved(tmp_path, OFFICIAL), allow_unexpected=["cls", "feat_regress", "region_*", "itm_*"])
    encoder = {n.removeprefix("uniter."): t for n, t in OFFICIAL.items() if n.startswith("uniter.")}
    same(model.state_dict(), encoder)


def test_half_precision_is_read_into_the_models_own(tmp_path: Path) -> None:
    model = pretraining()
    load_checkpoint(model, saved(tmp_path, {name: value.half() for name, value in OFFICIAL.items()}))
    same(model.state_dict(), {name: value.half().double() for name, value in OFFICIAL.items()})


def test_a_loaded_model_answers_as_the_saved_one(tmp_path: Path) -> None:
    before, after = vqa(1).eval(), vqa(2).eval()
    load_checkpoint(after, save_checkpoint(before, tmp_path / "model.safetensors"))
    assert torch.equal(before(**uniter_batch()).logits, after(**uniter_batch()).logits)


Spoil = Callable[[dict[str, Tensor]], dict[str, Tensor]]
QUERY = "uniter.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda s: {n: t for n, t in s.items() if n != QUERY}, f"missing {QUERY}", id="missing"),
        pytest.param(
            lambda s: {n: t for n, t in s.items() if n not in (WORDS, TIED[0])},
            f"missing {WORDS}, {TIED[0]}",
            id="missing-under-both-names",
        ),
        pytest.param(
            lambda s: s | {"rank_output.weight": torch.ones(1, 48)}, "unexpected rank_output.weight", id="extra"
        ),
        pytest.param(
            lambda s: s | {QUERY: s[QUERY][:, :40]},
            rf"{QUERY}: expected shape \(48, 48\), found \(48, 40\)",
            id="shape",
        ),
        pytest.param(
            lambda s: s | {WORDS: s[WORDS][:90], TIED[0]: s[WORDS][:90]},
            r"\(97, 48\), found \(90, 48\)",
            id="fewer-words",
        ),
        pytest.param(
            lambda s: s | {n: torch.cat([s[n], s[n], s[n]]) for n in (WORDS, TIED[0], "cls.predictions.bias")},
            r"\(97, 48\), found \(291, 48\)",
            id="another-vocabulary",
        ),
        pytest.param(lambda s: s | {QUERY: s[QUERY].long()}, f"{QUERY}: expected torch.float64", id="whole-numbers"),
        pytest.param(lambda s: s | {TIED[0]: s[TIED[0]] + 1}, "two that differ", id="tied-but-different"),
        pytest.param(
            lambda s: s | {QUERY.replace("uniter", "bert"): s[QUERY] + 1}, "also called", id="two-names-that-differ"
        ),
        pytest.param(lambda s: {"model": torch.ones(1)}, "none of its names, but model", id="something-else"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path: Path, spoil: Spoil, message: str) -> None:
    model = pretraining()
    before = values(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, saved(tmp_path, spoil(OFFICIAL)))
    same(model.state_dict(), before)


def test_a_head_of_another_size_is_refused_even_where_it_may_be_missing(tmp_path: Path) -> None:
    path = save_checkpoint(UniterForVQA(UniterConfig.tiny(), num_answers=6).double(), tmp_path / "six.pt")
    with pytest.raises(CheckpointError, match=r"vqa_output\.3\.weight: expected shape \(5, 96\), found \(6, 96\)"):
        load_checkpoint(vqa(), path, allow_missing=["vqa_output.*"])


def test_patterns_are_given_in_a_sequence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"vqa_output\.\*"):
        load_checkpoint(vqa(), saved(tmp_path, OFFICIAL), allow_missing="vqa_output.*")


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [("vqa_output.*", True), ("vqa_output", True), ("vqa_*", True), ("vqa", False), ("module.*", False), ("*", True)],
)
def test_a_pattern_is_a_whole_prefix_or_a_wildcard(tmp_path: Path, pattern: str, allowed: bool) -> None:
    path, model = saved(tmp_path, {n: t for n, t in OFFICIAL.items() if n.startswith("uniter.")}), vqa()
    if allowed:
        load_checkpoint(model, path, allow_missing=[pattern])
    else:
        with pytest.raises(CheckpointError, match=r"missing vqa_output\.0\.weight"):
            load_checkpoint(model, path, allow_missing=[pattern])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    model = pretraining()
    path, before = save_checkpoint(model, tmp_path / f"whole{suffix}"), values(model)
    data = path.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    other = pretraining(2)
    before = values(other)
    with pytest.raises(CheckpointError, match="cut"):
        load_checkpoint(other, cut)
    same(other.state_dict(), before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_missing_file_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=f"absent{suffix}"):
        load_checkpoint(vqa(), tmp_path / f"absent{suffix}")


class Code:
    """Unpickled, it would make a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    trace, path = tmp_path / "ran", tmp_path / "checkpoint.pt"
    torch.save(OFFICIAL | {"code": Code(str(trace))}, path, _use_new_zipfile_serialization=zipped)
    model = pretraining()
    before = values(model)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        load_checkpoint(model, path)
    assert not trace.exists()
    same(model.state_dict(), before)
    with warnings.catch_warnings():  # the same file does run its code where that is allowed
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": {}, "epoch": 3}, {1: torch.ones(2)}], ids=str)
def test_a_file_of_something_else_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="save the state dict alone"):
        load_checkpoint(vqa(), saved(tmp_path, value))


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = UniterForPretraining(UniterConfig.tiny())
    with pytest.raises(CheckpointError, match="meta device"):
        load_checkpoint(model, saved(tmp_path, OFFICIAL))


def test_a_safetensors_file_of_others_is_read(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", pretraining()
    save_file({name: value.clone() for name, value in OFFICIAL.items()}, path)
    load_checkpoint(model, path)
    same(model.state_dict(), OFFICIAL)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.ckpt"):
        save_checkpoint(vqa(), tmp_path / "model.ckpt")
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(vqa(1), tmp_path / "model.pt")
    whole = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OutputDirectoryError, match="no space"):
        save_checkpoint(vqa(2), path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("bert.encoder.layer.0.output.LayerNorm.gamma", "uniter.encoder.layer.0.output.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "uniter.embeddings.LayerNorm.bias"),
        ("module._orig_mod.uniter.pooler.dense.bias", "uniter.pooler.dense.bias"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("vqa_output.3.weight", "vqa_output.3.weight"),
    ],
)
def test_official_names(name: str, official: str) -> None:
    assert official_name(name) == official
    assert official_name(official) == official


BIAS = "vqa_output.3.bias"
CLAIMS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a vocabulary of terabytes": (
        lambda state: {**state, WORDS: torch.zeros(1, 1).expand(10**11, 48)},
        r"word_embeddings.*' of shape \(100000000000, 48\) over 4 bytes",
    ),
    "terabytes under two names of one tensor": (
        lambda state: {f"{prefix}.a": torch.zeros(1).expand(10**11) for prefix in ("uniter", "bert")},
        r"'uniter\.a' of shape",
    ),
    "a view of fewer numbers": (
        lambda state: {**state, BIAS: torch.as_strided(torch.zeros(4), (3, 2), (1, 1))},
        r"'vqa_output\.3\.bias' of shape \(3, 2\) over 16 bytes",
    ),
    "sparse": (
        lambda state: {**state, BIAS: state[BIAS].to_sparse()},
        r"vqa_output\.3\.bias' of layout torch.sparse_coo",
    ),
    "without values": (lambda state: {**state, BIAS: state[BIAS].to("meta")}, "on the meta device"),
    "8 bits": (lambda state: {**state, BIAS: state[BIAS].to(torch.float8_e4m3fn)}, "of torch.float8_e4m3fn"),
    "complex": (lambda state: {**state, BIAS: state[BIAS].to(torch.complex64)}, "of torch.complex64"),
    "a key as long as a book": (lambda state: {("x" * 10**6,): state[BIAS]}, r"'x+\.\.\."),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_tensor_is_judged_before_it_is_read(tmp_path: Path, case: str) -> None:
    """What it claims to hold is neither made nor compared: a file of some kilobytes is refused at once."""
    spoil, said = CLAIMS[case]
    model = vqa()
    before = values(model)
    path = saved(tmp_path, spoil(model.state_dict()))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(model, path)
    assert len(str(caught.value)) < 1000
    same(values(model), before)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, number: float, name: str) -> None:
    broken, model = vqa(1), vqa(2)
    before = values(model)
    with torch.no_grad():
        broken.get_parameter(BIAS)[1:3] = number
    save_checkpoint(broken, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"vqa_output\.3\.bias: expected finite numbers, found 2 of 5 that are not"
    ):
        load_checkpoint(model, tmp_path / name)
    same(values(model), before)


def test_a_configuration_that_names_a_size_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 48, "hidden_size": 96}')
    with pytest.raises(ConfigurationError, match="'hidden_size' more than once"):
        UniterConfig.from_json_file(tmp_path / "config.json")
