"""Perturbers: how far a perturbation may go, where it starts and how it moves."""

from advvl.perturbers.ascents import Ascent as Ascent
from advvl.perturbers.ascents import EmbeddingPerturber as EmbeddingPerturber
from advvl.perturbers.balls import L2 as L2
from advvl.perturbers.balls import Ball as Ball
from advvl.perturbers.balls import Linf as Linf
from advvl.perturbers.base import Memory as Memory
from advvl.perturbers.base import Moved as Moved
from advvl.perturbers.base import Perturber as Perturber
from advvl.perturbers.discrete import DiscretePerturber as DiscretePerturber
from advvl.perturbers.paired import Paired as Paired
from advvl.perturbers.places import Place as Place
from advvl.perturbers.places import delta_dtype as delta_dtype
from advvl.perturbers.rules import Adam as Adam
from advvl.perturbers.rules import Decay as Decay
from advvl.perturbers.rules import Momentum as Momentum
from advvl.perturbers.rules import StatefulRule as StatefulRule
from advvl.perturbers.starts import Given as Given
from advvl.perturbers.starts import Normal as Normal
from advvl.perturbers.starts import Sometimes as Sometimes
from advvl.perturbers.starts import Start as Start
from advvl.perturbers.starts import Uniform as Uniform
from advvl.perturbers.starts import Zero as Zero
from advvl.perturbers.universal import UniversalPerturber as UniversalPerturber
from advvl.perturbers.unperturbed import Unperturbed as Unperturbed
from advvl.perturbers.weights import WeightAscent as WeightAscent
