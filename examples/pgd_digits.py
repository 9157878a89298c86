"""An experiment of your own: a small network on scans of digits, trained plainly and by PGD, attacked in its pixels.

python examples/pgd_digits.py --seeds 3 --output runs/pgd_digits
"""

import sys
from dataclasses import dataclass, field

import torch
from torch import nn

import advvl
from advvl.data.digits.scans import load_digit_images
from advvl.data.source import TensorSource
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.cli import command
from advvl.experiments.experiment import Experiment, Row, Setup, seeded
from advvl.experiments.options import ExperimentOptions


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    evaluation: EvaluationOptions = field(default_factory=lambda: EvaluationOptions(radii=(0.5, 1.0), text_radii=()))
    radius: float = field(default=1.0, metadata={"help": "L2 radius of the ball that pgd trains in"})


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))

    def forward(self, pixels, targets):
        logits = super().forward(pixels)
        return {"loss": nn.functional.cross_entropy(logits, targets, reduction="none"), "logits": logits}


def data(options, directory):
    images = load_digit_images()
    pixels, targets = torch.from_numpy(images.features), torch.eye(10)[torch.from_numpy(images.classes)]
    train = TensorSource({"pixels": pixels[:1200], "targets": targets[:1200]})
    return train, TensorSource({"pixels": pixels[1200:], "targets": targets[1200:]})


def rows(options):
    pgd = advvl.pgd(radius=options.radius, step_size=options.radius / 4, norm="l2")
    return [Row("standard"), Row("pgd", pgd, update_cost=8)]


def set_up(options, parts, task, start):
    train, test = parts
    return Setup(seeded(task.seed, Network), train, options.finetune, test, sites={"image": "0:input"})


PGD_DIGITS = Experiment(Options, data=data, rows=rows, set_up=set_up)

if __name__ == "__main__":
    sys.exit(command(PGD_DIGITS, __doc__))
