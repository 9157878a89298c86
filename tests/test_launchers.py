"""The launchers people use, on the CPU: torchrun and accelerate."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import close_gradients
from support.distributed_cases import ROWS, Named, gradients, method_of, model_of
from support.launched import EXAMPLES
from support.spawn import Ended, run
from support.toy import toy_batch, toy_sites

from advvl import Adapter

pytestmark = pytest.mark.slow  # several processes

SCRIPT = str(Path(__file__).parent / "support" / "launched.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]


def accelerate() -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    kind = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *kind, f"--main_process_port={port}", SCRIPT]


def launched(command: list[str], how: str, folder: Path) -> Ended:
    (ended,) = run([[*command, how, str(folder)]], limit=120, variables={"CUDA_VISIBLE_DEVICES": ""})
    return ended


def found_in(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def alone(*seeds: int) -> Named:
    target = Adapter(model_of(), toy_sites())
    for seed in seeds:
        method_of("villa").step(
            target, toy_batch(ROWS, seed=seed), backward=lambda loss: (loss / len(seeds)).backward()
        )
    return gradients(target.model)


def test_torchrun_trains_as_one_process_does(tmp_path: Path) -> None:
    ended = launched(TORCHRUN, "torchrun", tmp_path)
    assert ended.code == 0, ended.output
    for found in found_in(tmp_path):
        close_gradients(found["gradients"], alone(0))


def test_torchrun_ends_all_when_one_dies(tmp_path: Path) -> None:
    ended = launched(TORCHRUN, "dies", tmp_path)
    assert ended.code == 1, ended
    assert not list(tmp_path.glob("*.pt"))


def test_accelerate_accumulates_reduces_once_and_gathers_each_example_once(tmp_path: Path) -> None:
    ended = launched(accelerate(), "accelerate", tmp_path)
    assert ended.code == 0, ended.output
    for found in found_in(tmp_path):
        close_gradients(found["gradients"], alone(0, 1))
        assert found["reductions"] == [0]
        assert sorted(found["numbers"]) == list(range(EXAMPLES))
