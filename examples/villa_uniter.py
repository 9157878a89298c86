"""VILLA on UNITER, end to end: visual question answering over real handwriting.

A tiny UNITER is pre-trained on captions of scenes of scanned digits, the standard way and adversarially (VILLA's stage
one), fine-tuned on questions about them (standard training, FreeLB, VILLA: stage two), and attacked by PGD on the image
features and the word embeddings. It ends with a table, a plot and checkpoints under one output directory.

    python examples/villa_uniter.py                                     the quick demo: minutes on two cores
    python examples/villa_uniter.py --preset evidence --seeds 5 --jobs 2 --threads 1 --output runs/evidence
    python examples/villa_uniter.py --config examples/configs/demo.yaml --method villa --villa.steps 4

After a kill, the same command with --resume continues and ends with the same weights and numbers.
"""

from __future__ import annotations

import sys

from advvl.experiments.cli import command
from advvl.experiments.uniter import UNITER

if __name__ == "__main__":
    sys.exit(command(UNITER, __doc__))
