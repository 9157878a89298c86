"""Shared by the benchmarks: the device, the seed, the races of the session, and the size of it all.

pytest benchmarks/ --benchmark-only [--device cpu] [--smoke | --full]
"""

from __future__ import annotations

import pytest
import torch
from measures import device_of, extent_of, facts
from pytest_benchmark.fixture import BenchmarkFixture  # type: ignore[import-untyped]
from races import Race, Races


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("advvl benchmarks")
    group.addoption("--device", help="what to measure on; ADVVL_BENCH_DEVICE; default: cuda if there is one, else cpu")
    group.addoption("--smoke", action="store_true", help="one round of few cases: does it run? its times say nothing")
    group.addoption(
        "--full", action="store_true", help="on a CPU, larger batches and every case: 36 minutes on two cores"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What is skipped or has failed before it was timed has said why; a second complaint would be an error here.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_report_header(config: pytest.Config) -> str:
    return f"benchmarks on: {device_of(config)}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return device_of(pytestconfig)


@pytest.fixture(scope="session")
def races(device: torch.device, pytestconfig: pytest.Config) -> Races:
    return Races(device, facts(device), smoke=extent_of(pytestconfig) == "smoke")


@pytest.fixture
def race(races: Races, benchmark: BenchmarkFixture) -> Race:
    return Race(races, benchmark)
