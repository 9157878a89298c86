"""VILLA on people's statements: is it true of three boxes of coloured objects?

NLVR (Suhr, Lewis, Yeh & Artzi, ACL 2017) has statements that people wrote about synthetic pictures, each true of some
pictures and false of others. A small UNITER, whose regions are the objects, learns to judge them: pre-trained on true
statements, the standard way and adversarially (VILLA's stage one), fine-tuned on both kinds (standard training, FreeLB,
VILLA: stage two), and attacked by PGD on the objects' features and on the word embeddings. It ends with a table and a plot.

The corpus is not part of advvl: get dev.json and test.json from github.com/lil-lab/nlvr. The statements of dev.json
are for training, except one fold for validation, and those of test.json are for testing.

    python examples/nlvr.py --data-dir nlvr                                standard training and VILLA, in short
    python examples/nlvr.py --data-dir nlvr --preset evidence --output runs/nlvr

After a kill, the same command with --resume continues and ends with the same weights and numbers.
"""

from __future__ import annotations

import sys

from advvl.experiments.cli import command
from advvl.experiments.nlvr import NLVR

if __name__ == "__main__":
    sys.exit(command(NLVR, __doc__))
