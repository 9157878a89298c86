"""Shared dropout masks: the random state of a round's first pass, replayed in every later one."""

from __future__ import annotations

import torch

from advvl.errors import RandomnessError
from advvl.passes.forward import Pass, Passes
from advvl.runtime.randomness import RandomState
from advvl.runtime.states import kept_buffers


class Replay:
    """Gives every pass of a round the randomness of its first pass; verified once per adapter."""

    def __init__(self) -> None:
        self._state: RandomState | None = None

    def forget(self) -> None:
        """Begin a new round, with new masks."""
        self._state = None

    def prepare(self, passes: Passes) -> bool:
        """Save the random state, or replay it; True in the first pass of the first round, which is to be verified."""
        if self._state is None:
            self._state = RandomState.of(passes.adapter.model)
            return not passes.adapter.replay_verified
        self._state.replay()
        return False

    def verify(self, passes: Passes, run: Pass) -> None:
        """Run the first pass again, without a graph, and see that replay gives the same logits.

        Raises:
            RandomnessError: it does not.
        """
        assert self._state is not None
        adapter = passes.adapter
        after = RandomState.of(adapter.model)
        self._state.replay()
        with torch.no_grad(), kept_buffers(adapter.model), adapter.bound(run.binding.again()):
            again = adapter.forward(passes.batch)
        first, second = passes.comparable(run.outputs), passes.comparable(again)
        close = not first.numel() or torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()))
        if not close or not RandomState.of(adapter.model).equals(after):
            raise RandomnessError(
                "expected replaying torch's random state to repeat a pass, but its outputs differ; use dropout='fresh'"
            )
        adapter.replay_verified = True
