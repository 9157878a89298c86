"""Regularisers: what is kept steady between the clean and the perturbed prediction."""

from advvl.regularizers.base import Regularizer as Regularizer
from advvl.regularizers.kl import KL as KL
from advvl.regularizers.kl import SymmetricKL as SymmetricKL
