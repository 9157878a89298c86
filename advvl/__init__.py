"""Adversarial training and attacks in the embedding space of vision-and-language models.

                batch
                  │
            ┌─────▼─────┐  sites: which tensor of which module is perturbed, and its mask
            │  adapter  │  adapters/
            └─────┬─────┘
       deltas     │ forward under injected deltas                    ┌────────────┐
     ┌────────────▼──────────────┐  outputs (clean, perturbed)       │ regulariser│ regularizers/
     │          passes           ├──────────────────────────────────►│  + task    │
     │          passes/          │◄──────────────────────────────────┤   loss     │
     └──────▲─────────────┬──────┘  losses                           └────────────┘
     probes │             │ feedback                used by training.py (a step) and attacks.py (an attack)
       ┌────┴─────────────▼────┐
       │     inner maximiser   │  maximizers/
       └────▲─────────────┬────┘
      start │             │ step along the gradient, back into the ball and the box
          perturber ──► ball ──► ops          perturbers/, ops/

Importing this loads torch and nothing else. `files`, `models`, `data`, `fit`, `tasks`, `evaluation` and `experiments` stand
on it and are imported by name.
"""

from advvl.adapters.base import Adapter as Adapter
from advvl.adapters.candidates import sites as sites
from advvl.adapters.injection import Binding as Binding
from advvl.adapters.injection import Site as Site
from advvl.adapters.registry import adapt as adapt
from advvl.adapters.registry import register as register
from advvl.attacks import Attack as Attack
from advvl.attacks import AttackResult as AttackResult
from advvl.errors import AdvVLError as AdvVLError
from advvl.maximizers.auto_pgd import AutoPGD as AutoPGD
from advvl.maximizers.base import AscentState as AscentState
from advvl.maximizers.base import InnerMaximizer as InnerMaximizer
from advvl.maximizers.free_at import FreeAT as FreeAT
from advvl.maximizers.freelb import FreeLB as FreeLB
from advvl.maximizers.minimum_norm import MinimumNorm as MinimumNorm
from advvl.maximizers.pgd import PGD as PGD
from advvl.maximizers.probes import Feedback as Feedback
from advvl.maximizers.probes import Probe as Probe
from advvl.maximizers.random_search import RandomSearch as RandomSearch
from advvl.passes.objective import Objective as Objective
from advvl.passes.traces import PassTrace as PassTrace
from advvl.perturbers.ascents import Ascent as Ascent
from advvl.perturbers.ascents import EmbeddingPerturber as EmbeddingPerturber
from advvl.perturbers.balls import L2 as L2
from advvl.perturbers.balls import Ball as Ball
from advvl.perturbers.balls import Linf as Linf
from advvl.perturbers.base import Moved as Moved
from advvl.perturbers.base import Perturber as Perturber
from advvl.perturbers.pixels import Normalised as Normalised
from advvl.perturbers.places import Place as Place
from advvl.perturbers.rules import Adam as Adam
from advvl.perturbers.rules import Decay as Decay
from advvl.perturbers.rules import Momentum as Momentum
from advvl.perturbers.starts import Given as Given
from advvl.perturbers.starts import Normal as Normal
from advvl.perturbers.starts import Start as Start
from advvl.perturbers.starts import Uniform as Uniform
from advvl.perturbers.starts import Zero as Zero
from advvl.perturbers.universal import UniversalPerturber as UniversalPerturber
from advvl.recipes.fare import fare as fare
from advvl.recipes.free_at import free_at as free_at
from advvl.recipes.freelb import freelb as freelb
from advvl.recipes.lxmert_adv import lxmert_adv as lxmert_adv
from advvl.recipes.neftune import neftune as neftune
from advvl.recipes.pgd import pgd as pgd
from advvl.recipes.smart import smart as smart
from advvl.recipes.tecoa import tecoa as tecoa
from advvl.recipes.trades import trades as trades
from advvl.recipes.vat import vat as vat
from advvl.recipes.villa import villa as villa
from advvl.recipes.villa_uniter import villa_uniter as villa_uniter
from advvl.regularizers.base import Regularizer as Regularizer
from advvl.regularizers.distance import SquaredDistance as SquaredDistance
from advvl.regularizers.kl import KL as KL
from advvl.regularizers.kl import SymmetricKL as SymmetricKL
from advvl.regularizers.references import AdapterOff as AdapterOff
from advvl.regularizers.references import Averaged as Averaged
from advvl.regularizers.references import Frozen as Frozen
from advvl.regularizers.references import Reference as Reference
from advvl.training import AdversarialTraining as AdversarialTraining
from advvl.training import StepReport as StepReport

__version__ = "0.1.0"

__all__ = [
    "KL",
    "L2",
    "PGD",
    "Adam",
    "Adapter",
    "AdapterOff",
    "AdvVLError",
    "AdversarialTraining",
    "Ascent",
    "AscentState",
    "Attack",
    "AttackResult",
    "AutoPGD",
    "Averaged",
    "Ball",
    "Binding",
    "Decay",
    "EmbeddingPerturber",
    "Feedback",
    "FreeAT",
    "FreeLB",
    "Frozen",
    "Given",
    "InnerMaximizer",
    "Linf",
    "MinimumNorm",
    "Momentum",
    "Moved",
    "Normal",
    "Normalised",
    "Objective",
    "PassTrace",
    "Perturber",
    "Place",
    "Probe",
    "RandomSearch",
    "Reference",
    "Regularizer",
    "Site",
    "SquaredDistance",
    "Start",
    "StepReport",
    "SymmetricKL",
    "Uniform",
    "UniversalPerturber",
    "Zero",
    "adapt",
    "fare",
    "free_at",
    "freelb",
    "lxmert_adv",
    "neftune",
    "pgd",
    "register",
    "sites",
    "smart",
    "tecoa",
    "trades",
    "vat",
    "villa",
    "villa_uniter",
]
