"""The driver: answers the probes of an inner maximiser, of a step or of an attack, until it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext

import torch
from torch import Tensor

from advvl.maximizers.probes import Feedback, Probe, Probes
from advvl.passes.backward import input_gradients
from advvl.passes.forward import Passes
from advvl.passes.scaling import wide_losses


def drive(probes: Probes, answer: Callable[[Probe], Feedback]) -> tuple[Mapping[str, Tensor], Feedback]:
    """Answer every probe until the maximiser returns, and always close its generator.

    Returns:
        The final perturbations, and the last feedback.
    """
    with closing(probes):
        probe = next(probes)
        while True:
            feedback = answer(probe)
            try:
                probe = probes.send(feedback)
            except StopIteration as stop:
                return stop.value, feedback


def ascend(passes: Passes, probe: Probe) -> Feedback:
    """Answer a probe of an attack: one forward, and the gradients of the perturbations alone."""
    graph = torch.enable_grad() if probe.delta_gradients else torch.no_grad()
    with graph, wide_losses(passes.adapter.model) if passes.in_half else nullcontext():
        run = passes.forward(probe.deltas, wants=probe.delta_gradients)
        losses, task = passes.task(run)
        run.binding.begin_backward()
        gradients = {}
        if probe.delta_gradients:
            gradients = input_gradients(task, run, passes)
        return passes.feedback(run, losses, gradients)
