"""Saving and replaying the global random state: of the CPU, and of every device that holds a model's parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators at one moment."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> RandomState:
        """Save the current state of the CPU and of every accelerator device among the model's parameters and buffers."""
        found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        return cls(
            torch.get_rng_state(),
            {
                device: torch.get_device_module(device).get_rng_state(device)
                for device in found
                if device.type not in ("cpu", "meta")
            },
        )

    def replay(self) -> None:
        """Restore the global generators to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)

    def equals(self, other: RandomState) -> bool:
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(state, other.devices[device]) for device, state in self.devices.items()
        )


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Leave the global random state as found."""
    state = RandomState.of(model)
    try:
        yield
    finally:
        state.replay()


def forked(generator: torch.Generator | None) -> torch.Generator:
    """Return `generator`, or a new one on the CPU, seeded once from torch's global generator."""
    if generator is not None:
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator that draws on `device`: this one, or a new one there, seeded by the next number of this one.

    Drawing 256x3x224x224 numbers on a CPU and copying them takes many times as long as a step on a GPU. The price is
    that a seed gives the same numbers on all devices of a kind, but different ones on a CPU and on a GPU.
    """
    if generator.device == device:
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))


def derive_seed(seed: int, *words: str | int) -> int:
    """Derive a seed below 2**63 for one purpose of a run, different from that of any other purpose, number or run."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
