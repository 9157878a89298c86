"""Modality interference on digits: half of the questions need the picture, half the words, and the other part misleads.

Each example has the scan of a digit and a word for a digit; its first word says which of them counts. In training both
usually agree, so a model may learn to look at the wrong one. The test replaces the modality that does not count by another
example's, and attacks it in embedding space.

    python examples/interference_digits.py --output runs/interference                     one seed, in short
    python examples/interference_digits.py --preset evidence --output runs/interference   five seeds

After a kill, the same command with --resume continues.
"""

import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import advvl
from advvl import Site
from advvl.data.digits.scans import load_digit_images
from advvl.data.source import TensorSource
from advvl.evaluation.accuracy_table import accuracy_table
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments.cli import command
from advvl.experiments.experiment import Experiment, Row, Setup, Task, seeded
from advvl.experiments.options import ExperimentOptions
from advvl.files import write_text
from advvl.fit.options import OptimizerOptions

LOOK, READ, DIGITS = 0, 1, 10  # words: which modality counts, then a digit
CONDITIONS = "as in training", "other picture or word", "picture counts", "word counts"


@dataclass(frozen=True, kw_only=True)
class Options(ExperimentOptions):
    evaluation: EvaluationOptions = field(default_factory=lambda: EvaluationOptions(radii=(1.0,), text_radii=(1.0,)))
    finetune: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(epochs=20, learning_rate=2e-3))
    agree: float = field(default=0.9, metadata={"help": "share of examples whose picture and word name the same digit"})
    radius: float = field(default=1.0, metadata={"help": "Linf radius of training, around embeddings and pixels"})


class Reader(nn.Module):
    """A small transformer over two words and the eight rows of a scan."""

    def __init__(self, width=32):
        super().__init__()
        self.words, self.rows = nn.Embedding(2 + DIGITS, width), nn.Linear(8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(10, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, DIGITS)

    def forward(self, words, pixels, targets, needs_words):
        del needs_words  # for the masks of the sites
        tokens = torch.cat([self.words(words), self.rows(pixels)], dim=1) + self.positions
        logits = self.head(self.encoder(tokens)[:, 0])
        return {"loss": F.cross_entropy(logits, targets, reduction="none"), "logits": logits}


def irrelevant_words(batch):
    return torch.cat([torch.zeros_like(batch["needs_words"]), ~batch["needs_words"]], dim=1)  # the first word counts


def irrelevant_rows(batch):
    return batch["needs_words"].expand(-1, 8)


SITES = {"text": Site("words", mask=irrelevant_words), "image": Site("rows", at="input", mask=irrelevant_rows)}


def source(part, agree, seed):
    """Return an example of each kind for every scan, in turn; of a share `agree` the other modality names its digit too."""
    images, draws = load_digit_images(), torch.Generator().manual_seed(seed)
    scans = torch.from_numpy(images.features[part]).float().reshape(-1, 8, 8).repeat_interleave(2, 0)
    classes = torch.from_numpy(images.classes[part]).repeat_interleave(2)
    other = torch.randint(DIGITS, classes.shape, generator=draws)
    said = torch.where(torch.rand(classes.shape, generator=draws) < agree, classes, other)
    needs_words = torch.arange(len(classes)) % 2 == 1
    words = torch.stack([torch.where(needs_words, READ, LOOK), 2 + said], dim=1)
    targets = torch.eye(DIGITS)[torch.where(needs_words, said, classes)]
    return TensorSource({"words": words, "pixels": scans, "targets": targets, "needs_words": needs_words[:, None]})


def data(options, directory):
    return source(slice(0, 1200), options.agree, 0), source(slice(1200, None), options.agree, 1)


def rows(options):
    method = advvl.modality_interference(("text", "image"), radius=options.radius, step_size=options.radius)
    return [
        Row("standard"),
        Row("standard, equal compute", updates=8 / 3),
        Row("modality interference", method, update_cost=8),
    ]


def set_up(options, parts, task, start):
    train, test = parts
    return Setup(seeded(task.seed, Reader), train, options.finetune, test, sites=SITES)


def conclude(options, rows, directory):
    """Write `interference.md`: the accuracy where the modality that does not count is another example's."""
    usual, misled = (source(slice(1200, None), agree, 1) for agree in (options.agree, 0.0))
    score = partial(accuracies, usual=usual, misled=misled)
    found = {row.name: [score(directory / Task(seed, row).weights) for seed in options.seeds] for row in rows}
    table = accuracy_table(CONDITIONS, found, examples=len(usual))
    write_text(directory / "interference.md", table + "\n")
    return table


def accuracies(weights, usual, misled):
    """Return the accuracy of a saved model on both tests, and on each half of the second."""
    model = Reader()
    model.load_state_dict(load_file(weights))
    shares = []
    for test in (usual, misled):
        batch = test.batch(range(len(test)))
        with torch.no_grad():
            right = (model.eval()(**batch)["logits"].argmax(1) == batch["targets"].argmax(1)).double()
        shares.append(right.mean().item())
    return [*shares, right[::2].mean().item(), right[1::2].mean().item()]


PRESETS = {"demo": {}, "evidence": {"seeds": (0, 1, 2, 3, 4), "finetune": {"epochs": 40}}}
INTERFERENCE_DIGITS = Experiment(Options, data=data, rows=rows, set_up=set_up, presets=PRESETS, conclude=conclude)

if __name__ == "__main__":
    sys.exit(command(INTERFERENCE_DIGITS, __doc__))
