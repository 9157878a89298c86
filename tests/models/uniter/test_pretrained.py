"""A task starts from any file of pre-training, extended as it needs; a file that does not fit changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.compare import same
from support.golden_cases import tensors
from torch import Tensor

from advvl.errors import CheckpointError, ConfigurationError
from advvl.models.uniter.checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from advvl.models.uniter.model import UniterConfig, UniterModel
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.retrieval import UniterForRetrieval
from advvl.tasks.uniter.vcr import VCR_WORDS, UniterForVCR, UniterForVCRPretraining
from advvl.tasks.uniter.vqa import UniterForVQA

OFFICIAL = tensors("uniter_pretrain", "uniter_pretrain")  # a state dict that the published code wrote
TYPES = "uniter.embeddings.token_type_embeddings.weight"
WORDS = "uniter.embeddings.word_embeddings.weight"
BY_WORD = (WORDS, "cls.predictions.decoder.weight", "cls.predictions.bias")
ROWS = len(OFFICIAL[WORDS])


def model_of(kind: type[UniterTask], seed: int = 1) -> UniterTask:
    torch.manual_seed(seed)
    return kind(UniterConfig.tiny()).double()


def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def values(model: UniterTask) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def padded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {name: torch.cat([state[name], torch.ones_like(state[name][:7])]) for name in BY_WORD}


@pytest.mark.parametrize(
    "disguise",
    [
        pytest.param(dict, id="official"),
        pytest.param(padded, id="padded-for-alignment"),
        pytest.param(lambda s: {f"module.{name}": t for name, t in s.items()}, id="wrapped"),
        pytest.param(
            lambda s: {n.replace("uniter.", "bert.").replace("Norm.weight", "Norm.gamma"): t for n, t in s.items()},
            id="bert-gamma",
        ),
        pytest.param(lambda s: {n: t.half() for n, t in s.items()}, id="half"),
    ],
)
@pytest.mark.parametrize("kind", [UniterForVCR, UniterForVCRPretraining])
def test_types_and_words_are_extended_under_every_name_in_use(
    tmp_path: Path, kind: type[UniterTask], disguise: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    model = model_of(kind)
    drawn = values(model)
    state = disguise(OFFICIAL)
    load_pretrained(model, saved(tmp_path, state))
    found, first = values(model), next(iter(state.values())).dtype
    words, types = found[WORDS], found[TYPES]
    assert torch.equal(words[:ROWS], OFFICIAL[WORDS].to(first).double())
    assert torch.equal(words[ROWS:], drawn[WORDS][ROWS:].to(first).double())
    assert len(words) == ROWS + VCR_WORDS
    assert torch.equal(types, OFFICIAL[TYPES][[0, 1, 0, 0]].to(first).double())
    if kind is UniterForVCRPretraining:
        assert model.get_parameter(BY_WORD[1]) is model.get_parameter(WORDS)
        assert torch.equal(found[BY_WORD[2]][:ROWS], OFFICIAL[BY_WORD[2]].to(first).double())
        assert not found[BY_WORD[2]][ROWS:].any()


def test_what_cannot_be_extended_is_refused_with_what_would_do(tmp_path: Path) -> None:
    path, model = saved(tmp_path, OFFICIAL), model_of(UniterForNLVR2)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"token_type_embeddings.*expected shape \(3, 48\), found \(2, 48\)"):
        load_checkpoint(model, path, allow_missing=["*"], allow_unexpected=["*"])
    with pytest.raises(ConfigurationError, match="load_checkpoint"):
        load_pretrained(UniterModel(UniterConfig.tiny()), path)  # type: ignore[arg-type]
    same(values(model), before)


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        pytest.param(UniterForNLVR2, lambda s: s | {TYPES: s[TYPES][:1]}, r"\(3, 48\), found \(1, 48\)", id="one-type"),
        pytest.param(
            UniterForNLVR2,
            lambda s: s | {TYPES: s[TYPES][[0, 0, 0, 1]]},
            r"\(3, 48\), found \(4, 48\)",
            id="vcrs-types",
        ),
        pytest.param(UniterForNLVR2, lambda s: s | {TYPES: s[TYPES][0, 0]}, r"found \(\)", id="no-table"),
        pytest.param(UniterForVCR, lambda s: s | {WORDS: s[WORDS][:, :9]}, r"found \(97, 9\)", id="narrow-words"),
        pytest.param(UniterForVCR, lambda s: s | {WORDS: s[WORDS][:50]}, r"found \(50, 48\)", id="few-words"),
        pytest.param(
            UniterForVCR, lambda s: s | {WORDS: s[WORDS].long()}, r"expected torch\S+, found", id="no-numbers"
        ),
        pytest.param(
            UniterForVCR, lambda s: {n: t for n, t in s.items() if n != WORDS}, f"missing {WORDS}", id="no-words"
        ),
        pytest.param(
            UniterForVCR,
            lambda s: s | {"bert" + WORDS.removeprefix("uniter"): s[WORDS] + 1},
            "differs from",
            id="twice",
        ),
        pytest.param(
            UniterForRetrieval,
            lambda s: {n: t for n, t in s.items() if not n.startswith("itm")},
            "missing itm_output.weight",
            id="nothing-to-rank-by",
        ),
        pytest.param(
            UniterForPretraining,
            lambda s: {n: t for n, t in s.items() if not n.startswith("cls")},
            "missing cls",
            id="no-head",
        ),
        pytest.param(UniterForVCR, lambda s: s | {"classifier.weight": torch.ones(2)}, "unexpected", id="another-head"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, kind: type[UniterTask], spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    model = model_of(kind)
    before = values(model)
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(model, saved(tmp_path, spoil(OFFICIAL)))
    same(values(model), before)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    tuned = save_checkpoint(UniterForVQA(UniterConfig.tiny(), num_answers=7), tmp_path / "vqa.pt")
    with pytest.raises(CheckpointError, match=r"vqa_output.3.weight: expected shape \(5, 96\), found \(7, 96\)"):
        load_pretrained(UniterForVQA(UniterConfig.tiny(), num_answers=5), tuned)


def test_a_configuration_has_the_sizes_of_pretraining_and_the_model_those_of_its_task() -> None:
    config = UniterConfig.tiny()
    model = UniterForVCR(config)
    assert (config.vocab_size, config.type_vocab_size) == (97, 2)
    assert (model.config.vocab_size, model.config.type_vocab_size) == (97 + VCR_WORDS, 4)
    assert UniterForNLVR2(config).config.type_vocab_size == 3
    assert UniterForVQA(config, num_answers=3).config is config
    with pytest.raises(ConfigurationError, match="at most 3 for UniterForNLVR2, got 4; give the sizes of pre-training"):
        UniterForNLVR2(UniterConfig.tiny(type_vocab_size=4))
