"""ViLTA, reconstructed from its abstract: do soft labels and synthesised negatives help pre-training?

Eight UNITERs are pre-trained on captions: plainly, with soft labels for masked words, with synthesised negatives for
matching, with both; each with and without VILLA's perturbations. All are then fine-tuned and attacked.

    python examples/vilta.py                                               the digits, in short
    python examples/vilta.py --preset evidence --output runs/vilta          five seeds
    python examples/vilta.py --data-dir reference_games --variant plain --variant both       people's words
    python examples/vilta.py --pretrain.epochs 6 --output runs/vilta-6      half the updates: is it faster?
    python examples/vilta.py --vilta.teacher bert --output runs/vilta-bert  the run trains a BERT as the teacher

After a kill, the same command with --resume continues and ends with the same weights and numbers.
"""

from __future__ import annotations

import sys

from advvl.experiments.cli import command
from advvl.experiments.vilta import VILTA, VILTA_COLORS

if __name__ == "__main__":
    colors = any(argument.startswith("--data-dir") for argument in sys.argv)
    sys.exit(command(VILTA_COLORS, __doc__) if colors else command(VILTA, __doc__))
