"""The training loop, on one process or several, resumed to the same bits."""

from advvl.fit.loop import fit as fit
