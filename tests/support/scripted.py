"""A maximiser without a model: one example of one number, whose losses and verdicts follow a script."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from advvl import Ascent, EmbeddingPerturber, Feedback, InnerMaximizer, Place, Start


def driven(
    maximizer: InnerMaximizer, ascent: Ascent, losses: Sequence[float], correct: Sequence[bool] | None = None
) -> tuple[list[float], float]:
    """The perturbations that a maximiser asks passes at, the last pass left out, and the one that it ends at.

    Arguments:
        losses, correct: of each of these passes; the gradient is 1.
    """
    perturber, place = EmbeddingPerturber(image=ascent), Place(torch.zeros(1, 1, 1, dtype=torch.float64))
    probes, points = maximizer.probes(perturber, generator=torch.Generator().manual_seed(0)), list[float]()
    probe = next(probes)
    while True:
        given, number = probe.deltas["image"], min(len(points), len(losses) - 1)
        delta = perturber.begin("image", given, place, None) if isinstance(given, Start) else given
        points.append(float(delta))
        feedback = Feedback(
            {"image": delta},
            {"image": torch.ones_like(delta)} if probe.delta_gradients else {},
            {"image": place},
            torch.tensor([losses[number]], dtype=torch.float64),
            None if correct is None else torch.tensor([correct[number]]),
        )
        try:
            probe = probes.send(feedback)
        except StopIteration as stop:
            assert len(points) == len(losses) + 1
            return points[:-1], float(stop.value["image"])
