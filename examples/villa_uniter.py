"""VILLA on UNITER, end to end: visual question answering over real handwriting.

A tiny UNITER is pre-trained on captions of scenes of scanned digits, the standard way and adversarially (VILLA's stage
one), fine-tuned on questions about them (standard training, FreeLB, VILLA: stage two), and attacked by PGD on the image
features and the word embeddings. It ends with a table, a plot and checkpoints under one output directory.

    python examples/villa_uniter.py                                     the quick demo: minutes on two cores
    python examples/villa_uniter.py --preset evidence --seeds 5 --jobs 2 --threads 1 --output runs/evidence
    python examples/villa_uniter.py --config examples/configs/demo.yaml --method villa --villa.steps 4

Killed at any moment, the same command with --resume goes on and ends with the same weights and numbers.
"""

from __future__ import annotations

import sys

from advvl.experiments.cli import exit_status
from advvl.experiments.flags import parse
from advvl.experiments.options import PRESETS, ExperimentOptions
from advvl.experiments.uniter import run


def main() -> None:
    options = parse(ExperimentOptions, presets=PRESETS, description=__doc__)
    run(options)


if __name__ == "__main__":
    sys.exit(exit_status(main))
