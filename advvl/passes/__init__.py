"""Passes: the only code that runs a model and differentiates."""

from advvl.passes.traces import PassTrace as PassTrace
