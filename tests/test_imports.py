"""Importing advvl costs torch and nothing else, and gives exactly the names that are promised."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import advvl

IMPORTED = ["torch", "advvl", "yaml", "safetensors"]  # in this order
NAMES = {
    *("Adapter", "Binding", "Site", "SoftPrompt", "adapt", "register", "sites"),
    *("AdversarialTraining", "Objective", "PassTrace", "StepReport"),
    *(
        "agft",
        "alum",
        "awp",
        "capo",
        "cat",
        "circuit_breakers",
        "dat",
        "embedding_attack",
        "er_cat",
        "fare",
        "fgm",
        "fgsm_rs",
        "free_at",
    ),
    *("freelb", "lat", "lxmert_adv", "modality_interference", "neftune", "pgd", "pmg_aft", "r_drop", "sam", "smart"),
    *("tecoa", "trades", "vat"),
    *("villa", "villa_uniter", "vilta"),
    *("Attack", "AttackResult", "AdvVLError", "FromClean"),
    *("Ball", "L2", "Linf", "Place"),
    *("Ascent", "EmbeddingPerturber", "Given", "Moved", "Normal", "Perturber", "Start", "Uniform", "Zero"),
    *("Adam", "Decay", "DiscretePerturber", "Momentum", "Normalised", "Paired", "Sometimes", "Unperturbed"),
    *("UniversalPerturber", "WeightAscent"),
    *(
        "AscentState",
        "AutoPGD",
        "EOT",
        "Feedback",
        "FreeAT",
        "FreeLB",
        "Held",
        "InnerMaximizer",
        "MinimumNorm",
        "PGD",
        "Probe",
    ),
    "RandomSearch",
    *("AdapterOff", "Averaged", "Frozen", "Reference"),
    *(
        "Alignment",
        "Distance",
        "JensenShannon",
        "KL",
        "Regularizer",
        "SoftCrossEntropy",
        "SquaredDistance",
        "SymmetricKL",
    ),
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The packages outside the standard library that each import adds, one after another in a fresh interpreter."""
    report = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        "    print('loaded:', *{module.partition('.')[0] for module in set(sys.modules) - before})"
    )
    ran = subprocess.run([sys.executable, "-c", report, *IMPORTED], capture_output=True, text=True, check=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("loaded:")]
    standard = set(sys.stdlib_module_names)
    return {name: set(line.split()[1:]) - standard for name, line in zip(IMPORTED, lines, strict=True)}


@pytest.mark.slow
def test_importing_the_core_loads_torch_and_nothing_else(loaded: dict[str, set[str]]) -> None:
    assert loaded["advvl"] - loaded["torch"] == {"advvl"}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["yaml", "safetensors"])
def test_the_check_of_what_is_loaded_can_fail(package: str, loaded: dict[str, set[str]]) -> None:
    assert package in loaded[package] - loaded["torch"]


def test_the_names_of_the_package_are_the_promised_ones() -> None:
    exported = {name for name, value in vars(advvl).items() if not isinstance(value, ModuleType)}
    assert {name for name in exported if not name.startswith("_")} == NAMES
    assert sorted(NAMES) == sorted(advvl.__all__)


def test_the_version_is_the_one_that_is_installed_by() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", advvl.__version__)
    setup = (Path(advvl.__file__).parents[1] / "setup.cfg").read_text()
    assert "version = attr: advvl.__version__" in setup
