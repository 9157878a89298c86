"""Adversarial training and attacks in the embedding space of vision-and-language models.

                batch
                  │
            ┌─────▼─────┐  sites: which tensor of which module is perturbed, and its mask
            │  adapter  │  adapters/base.py
            └─────┬─────┘
       deltas     │ forward under injected deltas                    ┌────────────┐
     ┌────────────▼──────────────┐  outputs (clean, perturbed)       │ regulariser│ regularizers.py
     │          passes           ├──────────────────────────────────►│  + task    │
     │ passes.py, rounds.py      │◄──────────────────────────────────┤   loss     │
     └──────▲─────────────┬──────┘  losses                           └────────────┘
     probes │             │ feedback                used by training.py (a step) and attacks.py (an attack)
       ┌────┴─────────────▼────┐
       │     inner maximiser   │  maximizers.py, probes.py
       └────▲─────────────┬────┘
      start │             │ step along the gradient, back into the ball and the box
          perturber ──► ball ──► ops          perturbers.py, balls.py, ops/

Importing this loads torch and nothing else. `models`, `tasks`, `data`, `evaluation`, `fit`, `trainer`, `config` and `cli`
stand on it and are imported by name.
"""

from advvl.adapters.base import Adapter as Adapter
from advvl.adapters.candidates import sites as sites
from advvl.adapters.injection import Binding as Binding
from advvl.adapters.injection import Site as Site
from advvl.adapters.registry import adapt as adapt
from advvl.adapters.registry import register as register
from advvl.attacks import Attack as Attack
from advvl.attacks import AttackResult as AttackResult
from advvl.balls import L2 as L2
from advvl.balls import Ball as Ball
from advvl.balls import Linf as Linf
from advvl.balls import Place as Place
from advvl.errors import AdvVLError as AdvVLError
from advvl.maximizers import PGD as PGD
from advvl.maximizers import AscentState as AscentState
from advvl.maximizers import FreeAT as FreeAT
from advvl.maximizers import FreeLB as FreeLB
from advvl.maximizers import InnerMaximizer as InnerMaximizer
from advvl.perturbers import Ascent as Ascent
from advvl.perturbers import EmbeddingPerturber as EmbeddingPerturber
from advvl.perturbers import Given as Given
from advvl.perturbers import Normal as Normal
from advvl.perturbers import Perturber as Perturber
from advvl.perturbers import Start as Start
from advvl.perturbers import Uniform as Uniform
from advvl.perturbers import Zero as Zero
from advvl.probes import Feedback as Feedback
from advvl.probes import Probe as Probe
from advvl.recipes import free_at as free_at
from advvl.recipes import freelb as freelb
from advvl.recipes import lxmert_adv as lxmert_adv
from advvl.recipes import pgd as pgd
from advvl.recipes import villa as villa
from advvl.regularizers import KL as KL
from advvl.regularizers import Regularizer as Regularizer
from advvl.regularizers import SymmetricKL as SymmetricKL
from advvl.traces import PassTrace as PassTrace
from advvl.training import AdversarialTraining as AdversarialTraining
from advvl.training import StepReport as StepReport
