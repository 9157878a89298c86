"""Regularisers: penalties on the difference between the clean and the perturbed prediction."""

from advvl.regularizers.base import Regularizer as Regularizer
from advvl.regularizers.distance import Alignment as Alignment
from advvl.regularizers.distance import Distance as Distance
from advvl.regularizers.distance import SquaredDistance as SquaredDistance
from advvl.regularizers.js import JensenShannon as JensenShannon
from advvl.regularizers.kl import KL as KL
from advvl.regularizers.kl import SymmetricKL as SymmetricKL
from advvl.regularizers.references import AdapterOff as AdapterOff
from advvl.regularizers.references import Averaged as Averaged
from advvl.regularizers.references import Frozen as Frozen
from advvl.regularizers.references import Reference as Reference
