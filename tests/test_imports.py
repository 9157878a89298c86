"""Importing advvl costs torch and nothing else, and gives exactly the names that are promised."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import advvl

NAMES = {
    *("Adapter", "Binding", "Site", "adapt", "register", "sites"),
    *("AdversarialTraining", "Objective", "PassTrace", "StepReport"),
    *("fare", "free_at", "freelb", "lxmert_adv", "neftune", "pgd", "smart", "tecoa", "trades", "vat", "villa"),
    *("Attack", "AttackResult", "AdvVLError"),
    *("Ball", "L2", "Linf", "Place"),
    *("Ascent", "EmbeddingPerturber", "Given", "Moved", "Normal", "Perturber", "Start", "Uniform", "Zero"),
    *("Adam", "Decay", "Momentum", "UniversalPerturber"),
    *("AscentState", "Feedback", "FreeAT", "FreeLB", "InnerMaximizer", "PGD", "Probe"),
    *("AdapterOff", "Averaged", "Frozen", "Reference"),
    *("KL", "Regularizer", "SquaredDistance", "SymmetricKL"),
}


def packages_loaded_by(code: str) -> set[str]:
    """The top-level packages outside the standard library that a fresh interpreter holds after running `code`."""
    report = f"{code}\nimport sys\nprint('loaded:', *{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split()) - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def with_torch() -> set[str]:
    return packages_loaded_by("import torch")


def test_importing_the_core_loads_torch_and_nothing_else(with_torch: set[str]) -> None:
    assert packages_loaded_by("import advvl") - with_torch == {"advvl"}


@pytest.mark.parametrize("package", ["yaml", "safetensors"])
def test_the_check_of_what_is_loaded_can_fail(package: str, with_torch: set[str]) -> None:
    assert package in packages_loaded_by(f"import advvl, {package}") - with_torch


def test_the_names_of_the_package_are_the_promised_ones() -> None:
    exported = {name for name, value in vars(advvl).items() if not isinstance(value, ModuleType)}
    assert {name for name in exported if not name.startswith("_")} == NAMES
