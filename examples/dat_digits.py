"""Discrete adversarial training (DAT) on scans of digits, beside plain and PGD training.

A small VQ-VAE is trained first, about a minute; then a small network, from each seed by each method. Accuracy is measured on
clean scans, under noise, blur and loss of contrast, and under PGD on the pixels.

    python examples/dat_digits.py --output runs/dat                           one seed, in short
    python examples/dat_digits.py --preset evidence --output runs/dat          five seeds
    python examples/dat_digits.py --perturbed before --output runs/dat-paper   the paper's Q(x + δ)

After a kill, the same command with --resume continues.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import advvl
from advvl.data.digits.scans import load_digit_images
from advvl.data.source import TensorSource
from advvl.evaluation.accuracy_table import accuracy_table
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.cli import command
from advvl.experiments.experiment import Experiment, Row, Setup, Task, seeded
from advvl.experiments.options import ExperimentOptions
from advvl.files import write_text
from advvl.fit.loop import fit
from advvl.fit.options import OptimizerOptions
from advvl.models.state_files import write_state
from advvl.models.vqgan.checkpoint import load_vqgan
from advvl.models.vqgan.model import VQGAN, VQGANConfig, VQLoss

BOX = (0.0, 1.0)
SIZES = VQGANConfig(codes=64, channels=16, multiples=(1, 2), blocks=1, attention=(), resolution=8, in_channels=1)
CORRUPTIONS = {
    "clean": lambda x: x,
    "noise": lambda x: (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(*BOX),
    "blur": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1),
    "contrast": lambda x: 0.3 * x + 0.7 * x.mean((1, 2, 3), keepdim=True),
}


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    evaluation: EvaluationOptions = field(default_factory=lambda: EvaluationOptions(radii=(0.5, 1.0), text_radii=()))
    finetune: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=20))
    radius: float = field(default=0.5, metadata={"help": "L2 radius in pixels of PGD's and DAT's training"})
    perturbed: Literal["after", "before"] = field(
        default="after", metadata={"help": "the release's or the paper's step"}
    )
    vq_epochs: int = field(default=30, metadata={"help": "of the VQ-VAE"})


class Network(nn.Sequential):
    def __init__(self):
        convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Flatten()
        super().__init__(*convolutions, nn.Linear(512, 10))

    def forward(self, pixels, targets):
        logits = super().forward(pixels)
        return {"loss": F.cross_entropy(logits, targets, reduction="none"), "logits": logits}


class Autoencoder(VQGAN):
    def forward(self, pixels, targets):
        return {"loss": VQLoss()(self, pixels)}


def scans():
    images = load_digit_images()
    pixels = torch.from_numpy(images.features).float().reshape(-1, 1, 8, 8)
    targets = torch.eye(10)[torch.from_numpy(images.classes)]
    parts = slice(0, 1200), slice(1200, None)
    return [TensorSource({"pixels": pixels[part], "targets": targets[part]}) for part in parts]


def prepare(options, directory):
    if not (directory / "vqvae.safetensors").exists():
        model, how = seeded(0, Autoencoder, SIZES), OptimizerOptions(epochs=options.vq_epochs, learning_rate=2e-3)
        fit(model, scans()[0], options=how, seed=0)
        write_state(model.cpu(), directory / "vqvae.safetensors", str)


def data(options, directory):
    model = VQGAN(SIZES)
    load_vqgan(model, directory / "vqvae.safetensors")
    return *scans(), model.eval().requires_grad_(False)


def rows(options):
    pgd = advvl.pgd(radius=options.radius, step_size=options.radius / 4, norm="l2", box=BOX)
    return [Row("standard"), Row("PGD", pgd, update_cost=17 / 3), Row("DAT", update_cost=4)]


def set_up(options, parts, task, start):
    train, test, discretise = parts
    dat = advvl.dat(discretise, radius=options.radius, step_size=options.radius, perturbed=options.perturbed)
    method, model = dat if task.row.name == "DAT" else None, seeded(task.seed, Network)
    return Setup(model, train, options.finetune, test, sites={"image": "0:input"}, boxes={"image": BOX}, method=method)


def conclude(options, rows, directory):
    """Write `corruptions.md`: accuracy on clean and corrupted scans, and the differences to the first row."""
    found = {row.name: [accuracies(directory / Task(seed, row).weights) for seed in options.seeds] for row in rows}
    table = accuracy_table([*CORRUPTIONS, "mean of corrupted"], found, examples=len(scans()[1]))
    write_text(directory / "corruptions.md", table + "\n")
    return table


def accuracies(weights):
    """Return the accuracy of a saved network on each kind of test scan, then its mean over the corrupted ones."""
    model, test = Network(), scans()[1]
    model.load_state_dict(load_file(weights))
    batch, shares = test.batch(range(len(test)), torch.Generator()), []
    for change in CORRUPTIONS.values():
        logits = model.eval()(change(batch["pixels"]), batch["targets"])["logits"]
        shares.append((logits.argmax(1) == batch["targets"].argmax(1)).double().mean().item())
    return [*shares, sum(shares[1:]) / len(shares[1:])]


PRESETS = {"demo": {}, "evidence": {"seeds": (0, 1, 2, 3, 4), "finetune": {"epochs": 40}, "vq_epochs": 60}}
DAT_DIGITS = Experiment(
    Options, data=data, rows=rows, set_up=set_up, presets=PRESETS, prepare=prepare, conclude=conclude
)

if __name__ == "__main__":
    sys.exit(command(DAT_DIGITS, __doc__))
