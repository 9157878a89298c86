"""VILLA on people's words: which of three colours do they describe?

Colors in Context (Monroe, Hawkins, Goodman & Potts, TACL 2017) is a game: a speaker sees three colours and describes one
of them, a listener clicks. A small UNITER learns to be the listener: pre-trained on the utterances of training games, the
standard way and adversarially (VILLA's stage one), fine-tuned with a score per colour (standard training, FreeLB, VILLA:
stage two), and attacked by PGD on the colours, which stay colours, and on the word embeddings. It ends with a table,
accuracy by condition beside people's, a plot, and a picture of the colours before and after the attack.

The corpus is not part of advvl: get its CSV files from github.com/hawkrobe/reference_games.

    python examples/colors.py --data-dir reference_games                              standard training and VILLA, in short
    python examples/colors.py --data-dir colors.tar.xz --preset evidence --output runs/colors
    python examples/colors.py --data-dir colors.zip --method standard --method freelb --finetune.epochs 12

After a kill, the same command with --resume continues and ends with the same weights and numbers.
"""

from __future__ import annotations

import sys

from advvl.experiments.cli import command
from advvl.experiments.colors import COLORS

if __name__ == "__main__":
    sys.exit(command(COLORS, __doc__))
