"""Bad arguments: every public entry point takes them or refuses them in words of its own, never in a raw error.

A call that is right is repeated with each of its arguments replaced by each of these values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import ToyModel, perturber, toy, toy_batch, toy_sites

import advvl
from advvl import (
    KL,
    L2,
    PGD,
    Adam,
    AdversarialTraining,
    Ascent,
    AscentState,
    Attack,
    AutoPGD,
    Averaged,
    Decay,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Frozen,
    Given,
    Linf,
    MinimumNorm,
    Momentum,
    Normal,
    Normalised,
    Objective,
    RandomSearch,
    Site,
    SquaredDistance,
    SymmetricKL,
    Uniform,
    UniversalPerturber,
)
from advvl.errors import AdvVLError
from advvl.evaluation.interference import modality_interference
from advvl.evaluation.loaders import AttackedLoader, attack_loader
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.robustness import WorstCase, clean_scores, robustness_curve
from advvl.evaluation.worst_case import worst_case

VALUES: list[Any] = [
    None, True, 0, 1, -1, 2**70, 1.5, -0.0, math.nan, math.inf, -math.inf, "", "text", "nan", b"x", (), [], {}, [1, "a"],
    {"a": 1}, {1: 2}, object(), object, len, torch.tensor(1.0), torch.zeros(2, 3), torch.tensor([]), np.float32(0.5),
    np.array([1, 2]), 1j, range(3), ("text", "image"),
]  # fmt: skip

L2_TEXT = {"text": Ascent(L2(1.0), step_size=0.5)}
SIZES = {"text": 0.1, "image": 0.1}
PIXELS: dict[str, Any] = {"radius": 0.1, "step_size": 0.1, "modality": "image", "box": (0, 1), "pixels": None}

PUBLISHED: dict[str, Any] = {
    "step_sizes": SIZES,
    "steps": 2,
    "radius": 1.0,
    "norm": "l2",
    "modalities": "together",
    "dropout": "fresh",
}


def method() -> AdversarialTraining:
    return AdversarialTraining(perturber(), FreeLB(2))


def curve_batch() -> dict[str, Any]:
    return toy_batch() | {"targets": torch.eye(4, dtype=torch.float64)[:3]}


def scored(batch: Any) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "targets"}


def scoring() -> Any:
    return advvl.adapt(ToyModel().double(), toy_sites(), call=lambda model, batch: model(**scored(batch)))


def judging() -> Any:
    target = scoring()
    target.model.eval()
    return target


ONE_STEP = [NamedAttack(name="step", maximizer=PGD(1))]

CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "L2": (L2, lambda: {"radius": 1.0, "per": "sample", "relative": False}),
    "Linf": (Linf, lambda: {"radius": 1.0, "per": "token", "relative": "row"}),
    "Uniform": (Uniform, lambda: {"magnitude": 0.1}),
    "Normal": (Normal, lambda: {"scale": 0.1}),
    "Given": (Given, lambda: {"delta": torch.zeros(2, 3)}),
    "Decay": (Decay, lambda: {"first": 0.1, "rate": 0.5}),
    "Momentum": (Momentum, lambda: {"decay": 0.9}),
    "Adam": (Adam, dict),
    "Normalised": (Normalised, lambda: {"mean": (0.5,), "std": (0.2,), "axis": 1}),
    "Ascent": (
        Ascent,
        lambda: (
            {"ball": L2(1.0), "step_size": 0.1, "start": Uniform(0.1), "rule": "sign", "box": (0, 1), "floor": 0.0}
            | {"pixels": None, "allow_zero_step": False}
        ),
    ),
    "EmbeddingPerturber": (EmbeddingPerturber, lambda: dict(L2_TEXT)),
    "UniversalPerturber": (UniversalPerturber, lambda: dict(L2_TEXT)),
    "PGD": (PGD, lambda: {"steps": 2, "modalities": "together", "keep": "last", "early_stop": False}),
    "AutoPGD": (AutoPGD, lambda: {"steps": 2}),
    "MinimumNorm": (MinimumNorm, lambda: {"steps": 2}),
    "RandomSearch": (RandomSearch, lambda: {"queries": 2, "share": 0.5}),
    "FreeLB": (FreeLB, lambda: {"steps": 2, "modalities": "together"}),
    "FreeAT": (FreeAT, lambda: {"replays": 2, "carry": True}),
    "KL": (KL, lambda: {"weight": 1.0, "reads": None, "reference": None, "on": "perturbed", "head": "softmax"}),
    "SymmetricKL": (SymmetricKL, lambda: {"weight": 1.0, "head": "softmax", "detach_clean": False}),
    "SquaredDistance": (SquaredDistance, lambda: {"weight": 1.0, "reads": "mix", "reference": None}),
    "Frozen": (Frozen, lambda: {"model": ToyModel()}),
    "Averaged": (Averaged, lambda: {"model": ToyModel(), "decay": 0.9}),
    "Objective": (Objective, lambda: {"task": 1.0, "penalty": 1.0, "loss": None}),
    "Site": (
        Site,
        lambda: {"module": "words", "at": "output", "mask": None, "rows": None, "firing": None, "examples": None},
    ),
    "adapt": (
        advvl.adapt,
        lambda: {
            "model": ToyModel(),
            "sites": toy_sites(),
            "call": None,
            "logits": None,
            "positions": None,
            "loss": None,
        },
    ),
    "sites": (advvl.sites, lambda: {"model": ToyModel().double(), "batch": toy_batch(), "call": None}),
    "AdversarialTraining": (
        AdversarialTraining,
        lambda: (
            {"perturber": perturber(), "maximizer": FreeLB(2), "regularizer": SymmetricKL(), "clean_weight": 0.0}
            | {"dropout": "fresh", "track_stats": "all", "nonfinite": "raise", "teach": Objective(), "climb": None}
        ),
    ),
    "step": (
        lambda **given: method().step(**given),
        lambda: (
            {"model": toy(), "batch": toy_batch(), "loss": None, "backward": None, "update": None, "sync": None}
            | {"generator": None, "state": None, "correct": None, "trace": None}
        ),
    ),
    "AscentState": (AscentState, lambda: {"deltas": {}}),
    "load_state_dict": (AscentState().load_state_dict, lambda: {"state": {"deltas": {}}}),
    "Attack": (
        Attack,
        lambda: (
            {"perturber": perturber(), "maximizer": PGD(2), "loss": None, "correct": None, "train_mode": False}
            | {"end_pass": True, "seed": 0}
        ),
    ),
    "attack": (lambda **given: Attack(perturber(), PGD(1))(**given), lambda: {"model": toy(), "batch": toy_batch()}),
    "inject": (lambda **given: toy().inject(**given).__enter__(), lambda: {"deltas": {}}),
    "villa": (advvl.villa, lambda: PUBLISHED | {"kl_weight": 1.0, "clean_weight": 0.0}),
    "freelb": (advvl.freelb, lambda: PUBLISHED | {"init_magnitude": 0.1}),
    "free_at": (advvl.free_at, lambda: {"radius": 0.1, "replays": 2, "box": None, "pixels": None, "modality": "image"}),
    "pgd": (advvl.pgd, lambda: PIXELS | {"steps": 2, "norm": "linf"}),
    "trades": (advvl.trades, lambda: PIXELS | {"beta": 6.0, "norm": "linf"}),
    "fare": (advvl.fare, lambda: PIXELS | {"model": ToyModel(), "steps": 2, "reads": "mix"}),
    "tecoa": (advvl.tecoa, lambda: PIXELS | {"text_features": torch.eye(3), "steps": 2, "scale": 100.0, "reads": len}),
    "vat": (
        advvl.vat,
        lambda: (
            {"radius": 8.0, "xi": 1e-4, "weight": 1.0, "task_weight": 1.0, "modality": "image", "dropout": "shared"}
        ),
    ),
    "smart": (
        advvl.smart,
        lambda: (
            {"radius": 1e-5, "step_size": 1e-3, "steps": 1, "weight": 1.0, "bregman": None, "bregman_weight": 1.0}
            | {"modality": "text"}
        ),
    ),
    "neftune": (advvl.neftune, lambda: {"alpha": 5.0, "modality": "text"}),
    "lxmert_adv": (advvl.lxmert_adv, lambda: {"task": "vqa", "dropout": "fresh"}),
    "WorstCase": (WorstCase, lambda: {"steps": 2, "step_fraction": 0.5, "restarts": 1, "objectives": ("margin",)}),
    "robustness_curve": (
        robustness_curve,
        lambda: (
            {"target": scoring(), "batches": [curve_batch()], "modality": "image", "radii": (0.1,)}
            | {"attacks": WorstCase(steps=1, restarts=1), "seed": 0, "targets": None}
        ),
    ),
    "clean_scores": (clean_scores, lambda: {"target": scoring(), "batches": [curve_batch()], "targets": None}),
    "NamedAttack": (
        NamedAttack,
        lambda: (
            {"name": "a", "maximizer": PGD(1), "objective": None, "loss": None, "restarts": 1, "step_fraction": 1.0}
            | {"rule": None, "surrogate": None}
        ),
    ),
    "worst_case": (
        worst_case,
        lambda: (
            {"model": judging(), "loader": [curve_batch()], "budgets": {"image": L2(0.1)}, "attacks": ONE_STEP}
            | {"targets": None, "score": None, "rows": None, "boxes": None, "pixels": None, "draws": 1, "seed": 0}
            | {"checks": False, "cache": None, "about": None}
        ),
    ),
    "modality_interference": (
        modality_interference,
        lambda: (
            {"model": judging(), "loader": [curve_batch()], "modalities": ("image",), "budget": None, "targets": None}
            | {"score": None, "seed": 0}
        ),
    ),
    "attack_loader": (
        attack_loader,
        lambda: (
            {"attack": Attack(perturber(), PGD(1)), "model": toy(), "loader": [toy_batch()], "place": None}
            | {"progress": False}
        ),
    ),
    "AttackedLoader.load": (AttackedLoader.load, lambda: {"path": "nowhere"}),
}


FUNCTIONS = {
    "loss",
    "backward",
    "update",
    "sync",
    "correct",
    "trace",
    "call",
    "logits",
    "positions",
    "place",
    "targets",
    "score",
    "rows",
    "cache",
}


def raw_errors(call: Callable[..., Any], given: Callable[[], dict[str, Any]]) -> list[str]:
    """The bad values of single arguments that end in an error that is none of ours."""
    found = []
    for name in given():
        for value in VALUES:
            if name in FUNCTIONS and callable(value):
                continue  # the caller's own, and so are its errors
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(**(given() | {name: value}))
            except AdvVLError:
                pass
            except Exception as error:
                found.append(f"{name}={value!r}: {type(error).__name__}: {str(error)[:80]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("entry", CALLS)
def test_a_bad_argument_is_refused_in_words(entry: str) -> None:
    assert not raw_errors(*CALLS[entry])
