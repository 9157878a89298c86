"""Published models of known robustness, in the folder that ADVVL_ORACLE names: `models.json` beside safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from advvl import L2, PGD, Adapter, Ascent, Attack, EmbeddingPerturber, InnerMaximizer, Linf, Site, Uniform
from advvl.evaluation.objectives import OBJECTIVES, Objective, as_scores

Step = float | Callable[[int], float]

LAYERS = {
    "conv": lambda given, out, kernel, stride, padding: nn.Conv2d(given, out, kernel, stride, padding),
    "linear": nn.Linear,
    "relu": nn.ReLU,
    "flatten": nn.Flatten,
}


class OnPixels(nn.Module):
    """A network behind its own normalisation, on pixels in [0, 1]; `pixels` is the site of the attack."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.pixels, self.network = nn.Identity(), network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((self.pixels(pixels) - self.mean) / self.std)


@dataclass(frozen=True)
class Known:
    """A model of known robustness: the network, the images, the threat, and the accuracy an attack has to reach."""

    name: str
    model: OnPixels
    images: Tensor
    labels: Tensor
    ball: Any
    clean: float
    robust_at_most: float

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.model, {"image": Site("pixels")}, call=lambda model, batch: model(batch["images"]))

    @property
    def batch(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels}

    def attack(
        self, maximizer: InnerMaximizer, objective: str | Objective, *, seed: int, step: Step, start: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Attack every image: the rows still right at every point seen, and the loss at the end, both `(N,)`.

        Arguments:
            step: the ascent's step size in radii, or the function that gives it for each step.
            start: from a point drawn uniformly in the ball, not from the image itself.
        """
        climbed = OBJECTIVES[objective] if isinstance(objective, str) else objective
        seen: list[Tensor] = []

        def loss(outputs: Tensor, batch: Any) -> Tensor:
            seen.append(outputs.detach().argmax(1) == batch["labels"])
            return climbed(outputs, as_scores(batch["labels"], outputs))

        options = {"start": Uniform(self.ball.radius)} if start else {}
        radius = self.ball.radius
        size = (lambda number: step(number) * radius) if callable(step) else step * radius
        ascent = Ascent(self.ball, step_size=size, box=(0.0, 1.0), **options)
        result = Attack(EmbeddingPerturber(image=ascent), maximizer, loss=loss, seed=seed)(self.adapter, self.batch)
        delta = result.deltas["image"]
        lengths = delta.flatten(1).norm(dim=1) if isinstance(self.ball, L2) else delta.flatten(1).abs().amax(1)
        assert (lengths <= self.ball.radius).all()
        assert result.losses is not None
        return torch.stack(seen).all(0), result.losses


def robust_accuracy(model: Known, *, steps: int, restarts: int, size: Step, maximizer: Any = PGD) -> float:
    """The share of images that are right at every point of `restarts` attacks on each of cross-entropy and margin."""
    alive = right(model)
    for objective in ("cross-entropy", "margin"):
        for restart in range(restarts):
            alive &= model.attack(maximizer(steps), objective, seed=restart, step=size)[0]
    return alive.float().mean().item()


def right(model: Known) -> Tensor:
    with torch.no_grad():
        return model.model(model.images).argmax(1) == model.labels


def oracle_folder() -> Path | None:
    named = os.environ.get("ADVVL_ORACLE")
    return Path(named) if named else None


def names() -> list[Any]:
    """The models of the folder, as parameters of a test; one that is skipped, by name, where there is no folder."""
    folder = oracle_folder()
    if folder is None:
        return [
            pytest.param("", marks=pytest.mark.skip(reason="ADVVL_ORACLE names no folder of known models"), id="none")
        ]
    return [pytest.param(name, id=name) for name in json.loads((folder / "models.json").read_text())]


def load(name: str) -> Known:
    """Read a model and its images."""
    folder = oracle_folder()
    assert folder is not None
    said = json.loads((folder / "models.json").read_text())[name]
    network = nn.Sequential(*(LAYERS[kind](*sizes) for kind, *sizes in said["layers"]))
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    data = load_file(folder / f"{said['images']}.safetensors")
    ball = {"linf": Linf, "l2": L2}[said["norm"]](said["radius"])
    model = OnPixels(network, said["mean"], said["std"]).eval()
    return Known(
        name, model, data["images"].float(), data["labels"].long(), ball, said["clean"], said["robust_at_most"]
    )
