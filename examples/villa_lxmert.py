"""LXMERT, trained the standard way and by LXMERT-AdvTrain (VILLA's method on LXMERT), and attacked by PGD.

Without files it asks questions about scenes of scanned digits, which it first writes in LXMERT's own formats. It ends with
a table, a plot and checkpoints under one output directory.

    python examples/villa_lxmert.py                                     the quick demo: minutes on two cores
    python examples/villa_lxmert.py --seeds 3                           with intervals over seeds
    python examples/villa_lxmert.py --preset published --checkpoint model_LXRT.pth --tokenizer vocab.txt \\
        --regions train2014_obj36.tsv,val2014_obj36.tsv --questions train.json,nominival.json \\
        --test_questions minival.json --answers data/vqa --output runs/vqa

After a kill, the same command with --resume continues and ends with the same weights and numbers.
"""

from __future__ import annotations

import sys

from advvl.experiments.cli import command
from advvl.experiments.lxmert import LXMERT

if __name__ == "__main__":
    sys.exit(command(LXMERT, __doc__))
