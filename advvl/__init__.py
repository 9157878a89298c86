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

Importing this loads torch and nothing else. `files`, `models`, `data`, `fit`, `tasks`, `evaluation` and `experiments`
build on it and are imported by name.
"""

from advvl.adapters.base import Adapter as Adapter
from advvl.adapters.candidates import sites as sites
from advvl.adapters.injection import Binding as Binding
from advvl.adapters.injection import Site as Site
from advvl.adapters.registry import adapt as adapt
from advvl.adapters.registry import register as register
from advvl.adapters.soft_prompts import SoftPrompt as SoftPrompt
from advvl.attacks import Attack as Attack
from advvl.attacks import AttackResult as AttackResult
from advvl.errors import AdvVLError as AdvVLError
from advvl.maximizers.auto_pgd import AutoPGD as AutoPGD
from advvl.maximizers.base import AscentState as AscentState
from advvl.maximizers.base import InnerMaximizer as InnerMaximizer
from advvl.maximizers.eot import EOT as EOT
from advvl.maximizers.free_at import FreeAT as FreeAT
from advvl.maximizers.freelb import FreeLB as FreeLB
from advvl.maximizers.held import Held as Held
from advvl.maximizers.minimum_norm import MinimumNorm as MinimumNorm
from advvl.maximizers.pgd import PGD as PGD
from advvl.maximizers.probes import Feedback as Feedback
from advvl.maximizers.probes import Probe as Probe
from advvl.maximizers.random_search import RandomSearch as RandomSearch
from advvl.passes.from_clean import FromClean as FromClean
from advvl.passes.objective import Objective as Objective
from advvl.passes.traces import PassTrace as PassTrace
from advvl.perturbers.ascents import Ascent as Ascent
from advvl.perturbers.ascents import EmbeddingPerturber as EmbeddingPerturber
from advvl.perturbers.balls import L2 as L2
from advvl.perturbers.balls import Ball as Ball
from advvl.perturbers.balls import Linf as Linf
from advvl.perturbers.base import Moved as Moved
from advvl.perturbers.base import Perturber as Perturber
from advvl.perturbers.discrete import DiscretePerturber as DiscretePerturber
from advvl.perturbers.paired import Paired as Paired
from advvl.perturbers.pixels import Normalised as Normalised
from advvl.perturbers.places import Place as Place
from advvl.perturbers.rules import Adam as Adam
from advvl.perturbers.rules import Decay as Decay
from advvl.perturbers.rules import Momentum as Momentum
from advvl.perturbers.starts import Given as Given
from advvl.perturbers.starts import Normal as Normal
from advvl.perturbers.starts import Sometimes as Sometimes
from advvl.perturbers.starts import Start as Start
from advvl.perturbers.starts import Uniform as Uniform
from advvl.perturbers.starts import Zero as Zero
from advvl.perturbers.universal import UniversalPerturber as UniversalPerturber
from advvl.perturbers.unperturbed import Unperturbed as Unperturbed
from advvl.perturbers.weights import WeightAscent as WeightAscent
from advvl.recipes.agft import agft as agft
from advvl.recipes.alum import alum as alum
from advvl.recipes.awp import awp as awp
from advvl.recipes.capo import capo as capo
from advvl.recipes.cat import cat as cat
from advvl.recipes.circuit_breakers import circuit_breakers as circuit_breakers
from advvl.recipes.dat import dat as dat
from advvl.recipes.embedding_attack import embedding_attack as embedding_attack
from advvl.recipes.er_cat import er_cat as er_cat
from advvl.recipes.fare import fare as fare
from advvl.recipes.fgm import fgm as fgm
from advvl.recipes.fgsm_rs import fgsm_rs as fgsm_rs
from advvl.recipes.free_at import free_at as free_at
from advvl.recipes.freelb import freelb as freelb
from advvl.recipes.lat import lat as lat
from advvl.recipes.lxmert_adv import lxmert_adv as lxmert_adv
from advvl.recipes.modality_interference import modality_interference as modality_interference
from advvl.recipes.neftune import neftune as neftune
from advvl.recipes.pgd import pgd as pgd
from advvl.recipes.pmg_aft import pmg_aft as pmg_aft
from advvl.recipes.r_drop import r_drop as r_drop
from advvl.recipes.sam import sam as sam
from advvl.recipes.smart import smart as smart
from advvl.recipes.tecoa import tecoa as tecoa
from advvl.recipes.trades import trades as trades
from advvl.recipes.vat import vat as vat
from advvl.recipes.villa import villa as villa
from advvl.recipes.villa_uniter import villa_uniter as villa_uniter
from advvl.recipes.vilta import vilta as vilta
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
from advvl.regularizers.soft_labels import SoftCrossEntropy as SoftCrossEntropy
from advvl.training import AdversarialTraining as AdversarialTraining
from advvl.training import StepReport as StepReport

__version__ = "0.1.0"

__all__ = [
    "EOT",
    "KL",
    "L2",
    "PGD",
    "Adam",
    "Adapter",
    "AdapterOff",
    "AdvVLError",
    "AdversarialTraining",
    "Alignment",
    "Ascent",
    "AscentState",
    "Attack",
    "AttackResult",
    "AutoPGD",
    "Averaged",
    "Ball",
    "Binding",
    "Decay",
    "DiscretePerturber",
    "Distance",
    "EmbeddingPerturber",
    "Feedback",
    "FreeAT",
    "FreeLB",
    "FromClean",
    "Frozen",
    "Given",
    "Held",
    "InnerMaximizer",
    "JensenShannon",
    "Linf",
    "MinimumNorm",
    "Momentum",
    "Moved",
    "Normal",
    "Normalised",
    "Objective",
    "Paired",
    "PassTrace",
    "Perturber",
    "Place",
    "Probe",
    "RandomSearch",
    "Reference",
    "Regularizer",
    "Site",
    "SoftCrossEntropy",
    "SoftPrompt",
    "Sometimes",
    "SquaredDistance",
    "Start",
    "StepReport",
    "SymmetricKL",
    "Uniform",
    "UniversalPerturber",
    "Unperturbed",
    "WeightAscent",
    "Zero",
    "adapt",
    "agft",
    "alum",
    "awp",
    "capo",
    "cat",
    "circuit_breakers",
    "dat",
    "embedding_attack",
    "er_cat",
    "fare",
    "fgm",
    "fgsm_rs",
    "free_at",
    "freelb",
    "lat",
    "lxmert_adv",
    "modality_interference",
    "neftune",
    "pgd",
    "pmg_aft",
    "r_drop",
    "register",
    "sam",
    "sites",
    "smart",
    "tecoa",
    "trades",
    "vat",
    "villa",
    "villa_uniter",
    "vilta",
]
