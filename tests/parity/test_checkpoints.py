"""Names, shapes and loads of UNITER's checkpoints, at the sizes of base and large, as the published code has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden_cases import document
from torch import Tensor

from advvl.models.uniter.checkpoint import load_checkpoint, load_pretrained, save_checkpoint
from advvl.models.uniter.model import UniterConfig
from advvl.models.uniter.task import TYPES, UniterTask
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.referring import UniterForReferringExpressions
from advvl.tasks.uniter.retrieval import UniterForRetrieval
from advvl.tasks.uniter.vcr import VCR_WORDS, UniterForVCR, UniterForVCRPretraining
from advvl.tasks.uniter.ve import UniterForVE
from advvl.tasks.uniter.vqa import UniterForVQA

SIZES = {"base": UniterConfig.base, "large": UniterConfig.large}
MODELS: dict[str, Callable[[UniterConfig], UniterTask]] = {
    "UniterForPretraining": UniterForPretraining,
    "UniterForVisualQuestionAnswering": partial(UniterForVQA, num_answers=3129),
    "UniterForVisualEntailment": UniterForVE,
    "UniterForNlvr2Paired": partial(UniterForNLVR2, variant="paired"),
    "UniterForNlvr2Triplet": partial(UniterForNLVR2, variant="triplet"),
    "UniterForNlvr2PairedAttn": UniterForNLVR2,
    "UniterForVisualCommonsenseReasoning": UniterForVCR,
    "UniterForImageTextRetrieval": UniterForRetrieval,
    "UniterForImageTextRetrievalHardNeg": UniterForRetrieval,
    "UniterForReferringExpressionComprehension": UniterForReferringExpressions,
    "UniterForReferringExpressionComprehension, mlp 2": partial(UniterForReferringExpressions, mlp=2),
    "UniterForPretrainingForVCR": UniterForVCRPretraining,
}
GROWN = (
    "token_type_embeddings.weight",
    "word_embeddings.weight",
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
)


@pytest.mark.parametrize("size", SIZES)
def test_parity_with_checkpoints_holds_every_model(size: str) -> None:
    assert document("checkpoints", size)["models"].keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_parity_with_checkpoints_in_names_and_shapes(size: str, name: str) -> None:
    """As built, and, of a model that has types and words of its own, as extended, which ours is from the start."""
    golden = document("checkpoints", size)
    of = golden["models"][name]
    with torch.device("meta"):
        model = MODELS[name](SIZES[size]())
    built = golden["trunk"] | of["as_built"]["shapes"]
    assert len(built) == of["as_built"]["keys"]
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    extended = of.get("after_extension", {"parameters": of["as_built"]["parameters"], "changed": {}})
    assert shapes == built | extended["changed"]
    assert all(key.endswith(GROWN) for key in extended["changed"])
    assert sum(p.numel() for p in model.parameters()) == extended["parameters"]
    tied = [pair for pair in of["as_built"]["tied"] if model.get_parameter(pair[0]) is not model.get_parameter(pair[1])]
    assert not tied


def tiny(name: str, seed: int) -> UniterTask:
    torch.manual_seed(seed)
    return MODELS[name](UniterConfig.tiny())


def values(model: UniterTask) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def saved(model: UniterTask, tmp_path: Path) -> Path:
    """The model's file, of weights that no initialisation gives: all moved at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return save_checkpoint(model, tmp_path / "first.pt")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "UniterForPretraining"])
def test_parity_with_checkpoints_in_loading_a_first_stage(tmp_path: Path, name: str) -> None:
    first = tiny("UniterForPretraining", 1)
    path, given = saved(first, tmp_path), values(first)
    model = tiny(name, 2)
    drawn = values(model)
    report = load_pretrained(model, path)
    found, golden = values(model), document("checkpoints", "base")["loading_a_first_stage_checkpoint"][name]

    derived = {key for key in golden["missing"] if key.startswith("rank_output")}  # started from another of the file
    assert sorted({*report.missing, *derived}) == golden["missing"]
    assert sorted(report.unexpected) == golden["unexpected"]
    same = {key for key in found.keys() & given.keys() if torch.equal(found[key], given[key])}
    grown = set(golden["after"]["row_by_row"]) - {"cls.predictions.transform.dense.weight"}
    kept = {key for key in golden["after"]["differs_from_checkpoint"] if key != "cls.predictions.bias"}
    if name == "UniterForPretrainingForVCR":  # published, the second stage throws the head of the first away
        kept |= {"cls.predictions.transform.dense.weight"}
        grown |= {"cls.predictions.bias"}
    assert found.keys() - same == {*golden["after"]["initialised"], *grown}
    assert kept <= same
    assert len(same - kept) == golden["after"]["from_checkpoint"]

    types = golden["after"]["row_by_row"].get(TYPES, [0, 1])
    assert torch.equal(found[TYPES], given[TYPES][types])
    for key in grown - {TYPES}:
        rows = len(given[key])
        assert len(found[key]) == rows + VCR_WORDS
        assert torch.equal(found[key][:rows], given[key])
        assert torch.equal(found[key][rows:], drawn[key][rows:])
    for key in set(golden["after"]["initialised"]) - derived:
        assert torch.equal(found[key], drawn[key])


def test_parity_with_checkpoints_in_the_draw_of_new_words() -> None:
    torch.manual_seed(3)
    golden = document("checkpoints", "base")["loading_a_first_stage_checkpoint"]["UniterForVisualCommonsenseReasoning"]
    spread = golden["new word rows"]["initializer_range"]
    config = UniterConfig.tiny(initializer_range=spread)
    words = UniterForVCR(config).uniter.embeddings.word_embeddings.weight[-VCR_WORDS:]
    assert words.mean().item() == pytest.approx(golden["new word rows"]["mean"], abs=0.1 * spread)
    assert words.std().item() == pytest.approx(golden["new word rows"]["std"], rel=0.05)


def test_parity_with_checkpoints_in_the_ranking_head(tmp_path: Path) -> None:
    """It starts as a copy of a match's score, not as a view that moves with it; one of the file's own is kept."""
    golden = document("checkpoints", "base")
    assert golden["loading_a_first_stage_checkpoint"]["UniterForImageTextRetrieval"][
        "rank_output equals itm_output's row 1"
    ]
    model = tiny("UniterForImageTextRetrieval", 2)
    load_pretrained(model, saved(tiny("UniterForPretraining", 1), tmp_path))
    assert isinstance(model, UniterForRetrieval)
    assert torch.equal(model.rank_output.weight, model.itm_output.weight[1:])
    assert torch.equal(model.rank_output.bias, model.itm_output.bias[1:])
    with torch.no_grad():
        model.rank_output.weight.add_(1)
    assert not torch.equal(model.rank_output.weight, model.itm_output.weight[1:])
    path = save_checkpoint(model, tmp_path / "tuned.pt")
    for load in (load_pretrained, load_checkpoint):
        again = tiny("UniterForImageTextRetrieval", 3)
        load(again, path)
        assert torch.equal(again.rank_output.weight, model.rank_output.weight)


def test_parity_with_checkpoints_in_loading_a_second_stage(tmp_path: Path) -> None:
    second = tiny("UniterForPretrainingForVCR", 1)
    path, given = saved(second, tmp_path), values(second)
    model = tiny("UniterForVisualCommonsenseReasoning", 2)
    report = load_pretrained(model, path)
    golden: dict[str, Any] = document("checkpoints", "base")["other_loads"]
    golden = golden["second-stage checkpoint with checkpoint_from = vcr_pretrain"]
    assert sorted(report.missing) == golden["missing"]
    assert sorted(report.unexpected) == golden["unexpected"]
    same = [key for key, value in values(model).items() if key in given and torch.equal(value, given[key])]
    assert len(same) == golden["matched"]
    assert second.get_parameter("cls.predictions.decoder.weight") is second.uniter.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["UniterForNlvr2PairedAttn", "UniterForVisualCommonsenseReasoning"])
def test_parity_with_checkpoints_in_a_fine_tuned_one(tmp_path: Path, name: str) -> None:
    model = tiny(name, 1)
    path = saved(model, tmp_path)
    for load in (load_checkpoint, load_pretrained):
        again = tiny(name, 2)
        report = load(again, path)
        assert (report.missing, report.unexpected) == ((), ())
        assert all(torch.equal(again.state_dict()[key], value) for key, value in values(model).items())
