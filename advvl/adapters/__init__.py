"""Adapters: which tensor of a model is perturbed, how the model is called, and what its outputs mean."""

from advvl.adapters.base import Adapter as Adapter
from advvl.adapters.candidates import sites as sites
from advvl.adapters.injection import Site as Site
from advvl.adapters.registry import adapt as adapt
from advvl.adapters.registry import register as register
from advvl.adapters.soft_prompts import SoftPrompt as SoftPrompt
