"""Devices by name, and what makes equal computations give equal bits."""

from __future__ import annotations

import os

import pytest
import torch

from advvl.errors import ConfigurationError
from advvl.experiments.devices import accelerator_on, device_of, reproducible


def test_what_makes_bits_equal_is_put_back_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with reproducible(threads=1):
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled() == torch.cuda.is_available()
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["quantum", "mps:7", "meta", "cuda", "cuda:0"])
def test_a_device_that_is_not_there_is_refused_with_what_there_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match=f"device of this machine, auto, cpu, got '{device}'"):
        accelerator_on(device)


def test_a_second_gpu_has_a_name_and_a_third_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = ["auto", "cuda", "cuda:1", "cpu"]
    assert [str(device_of(name)) for name in names] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    with pytest.raises(ConfigurationError, match="auto, cpu, cuda:0, cuda:1, got 'cuda:2'"):
        device_of("cuda:2")
