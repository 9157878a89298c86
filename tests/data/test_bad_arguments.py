"""What the data, the options and the experiments take, against a table of bad values: each is refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch

from advvl.data.digits.corpus import DigitsConfig
from advvl.data.lxmert.answers import AnswerTable
from advvl.data.lxmert.lines import Regions
from advvl.data.lxmert.sources import Pictures, Sentences
from advvl.data.source import TensorSource
from advvl.data.targets import annotator_score, soft_targets
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import AdvVLError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.devices import device_of
from advvl.experiments.lxmert_options import LxmertAdversary, LxmertOptions, LxmertSize
from advvl.experiments.options import DataOptions
from advvl.experiments.uniter import UniterOptions
from advvl.experiments.villa_options import UniterSize, VillaAdversary
from advvl.fit.bert_adam import BertAdam, warmup_linear
from advvl.fit.options import LoopOptions, OptimizerOptions

VALUES: list[Any] = [None, True, -1, 1.5, math.nan, math.inf, "x", "", b"b", [], ["a"], [[]], ["a", "a"], {"a": 1}]
VALUES += [torch.ones(2), object(), lambda *_: None]


def region() -> dict[str, Any]:
    numbers = {name: torch.zeros(1, dtype=torch.long) for name in ("object_ids", "attribute_ids")}
    scores = {name: torch.ones(1) for name in ("object_scores", "attribute_scores")}
    return {"image_id": "a", "height": 10, "width": 10, "boxes": torch.zeros(1, 4), "features": torch.ones(1, 2)} | {
        **numbers,
        **scores,
    }


def defaults(options: type) -> dict[str, Any]:
    return {item.name: item.default for item in fields(options) if item.default is not MISSING}


CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "TensorSource": (TensorSource, {"tensors": {"a": torch.ones(3)}}),
    "batch": (TensorSource({"a": torch.ones(3)}).batch, {"indices": [0]}),
    "annotator_score": (annotator_score, {"count": 3}),
    "soft_targets": (soft_targets, {"targets": [{"labels": [0], "scores": [1.0]}], "num_answers": 3}),
    "a target": (lambda target: soft_targets([target], 3), {"target": {"labels": [0], "scores": [1.0]}}),
    "a score": (
        lambda label, score: soft_targets([{"labels": [label], "scores": [score]}], 3),
        {"label": 0, "score": 1.0},
    ),
    "AnswerTable": (AnswerTable, {"answers": ("a", "b")}),
    "Sentences": (Sentences, {"tokenizer": build_tokenizer(["a b"]), "length": 20}),
    "Pictures": (Pictures, {"files": []}),
    "Regions": (Regions, region()),
    "warmup_linear": (warmup_linear, {"update": 1, "updates": 3, "warmup": 0.1}),
    "BertAdam": (
        lambda **given: BertAdam([torch.nn.Parameter(torch.ones(2))], **given),
        {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "device_of": (device_of, {"device": "cpu"}),
}
CALLS |= {
    options.__name__: (options, defaults(options))
    for options in (
        *(DigitsConfig, LoopOptions, OptimizerOptions, EvaluationOptions, DataOptions),
        *(UniterOptions, UniterSize, VillaAdversary, LxmertOptions, LxmertSize, LxmertAdversary),
    )
}


@pytest.mark.parametrize("entry", CALLS)
def test_a_bad_argument_is_refused_in_words(entry: str) -> None:
    call, given = CALLS[entry]
    raw = []
    for name in given:
        for value in VALUES:
            try:
                call(**(given | {name: value}))
            except AdvVLError:
                pass
            except Exception as error:
                raw.append(f"{name}={value!r}: {type(error).__name__}: {str(error)[:80]}")
    assert not raw
