"""Runs that `fit` refuses: combinations of accelerator, method and options that cannot work."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn

from advvl.checks import at_least, check_each, check_functions, check_seed, choice, flag, instance
from advvl.data.source import BatchSource, Sampler
from advvl.errors import ConfigurationError
from advvl.fit.checkpoints import Checkpoints, OneFile
from advvl.fit.options import LoopOptions, OptimizerOptions, Weighting
from advvl.runtime.processes import process_count
from advvl.training import AdversarialTraining


def check_arguments(**arguments: Any) -> None:
    """Check the types of all arguments of `fit`, and that there are trainable parameters and examples.

    Raises:
        ConfigurationError: an argument of another type, a source without examples, a model without trainable parameters.
    """
    given = SimpleNamespace(**arguments)
    instance(nn.Module, given, "model")
    check_each(given, ("source",), _is_source, "a BatchSource, with len() and batch(indices, generator)")
    instance(OptimizerOptions, given, "options")
    check_seed(given.seed)
    if given.updates is not None:
        at_least(1, given, "updates")
    check_each(given, ("sampler",), _is_sampler, "a Sampler, with examples, parts(…) and updates(…), or None")
    check_each(given, ("method",), _are_methods, "of type AdversarialTraining or None, or one for each task by name")
    if isinstance(given.method, Mapping) and given.adversarial_tasks is not None:
        raise ConfigurationError(
            "expected adversarial_tasks=None with a method for each task, got both; name tasks once"
        )
    at_least(0, given, "adversarial_from")
    check_each(given, ("adversarial_tasks",), _are_tasks, "a collection of names, or None")
    check_functions(target=given.target, optimizer=given.optimizer, count=given.count, log=given.log)
    choice(given, "weighting", Weighting)
    instance((Accelerator, NoneType), given, "accelerator")
    instance((Path, Checkpoints, OneFile, NoneType), given, "checkpoint")
    flag(given, "resume")
    instance((LoopOptions, NoneType), given, "loop")
    if len(given.source) < 1:
        raise ConfigurationError("expected a source of at least 1 example, got none")
    if not any(parameter.requires_grad for parameter in given.model.parameters()):
        raise ConfigurationError(
            "expected a model with parameters to train, got none that requires a gradient; unfreeze some"
        )


def _are_methods(value: Any) -> bool:
    each = value.values() if isinstance(value, Mapping) and value else [value]
    named = not isinstance(value, Mapping) or all(isinstance(name, str) for name in value)
    return value is None or (named and all(isinstance(one, AdversarialTraining) for one in each))


def _is_source(value: Any) -> bool:
    return hasattr(value, "__len__") and callable(getattr(value, "batch", None))


def _is_sampler(value: Any) -> bool:
    asked = callable(getattr(value, "parts", None)) and callable(getattr(value, "updates", None))
    return value is None or (asked and hasattr(value, "examples"))


def _are_tasks(value: Any) -> bool:
    whole = isinstance(value, Collection) and not isinstance(value, str)
    return value is None or (whole and all(isinstance(name, str) for name in value))


def check_accelerator(accelerator: Accelerator, batch_size: int | None, loop: LoopOptions) -> None:
    """Check that every process holds all parameters, knows of the others, and gets an example of each batch.

    Arguments:
        batch_size: examples in an update, over all processes; None: a sampler says it.

    Raises:
        ConfigurationError: it does not.
    """
    kind: Any = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigurationError(
            f"expected every process to hold all parameters, as under DDP, got {kind.value}; see docs/scaling.md"
        )
    started = max(process_count(), int(os.environ.get("WORLD_SIZE", "1")))
    if started != accelerator.num_processes:
        raise ConfigurationError(
            f"expected an accelerator that knows of all {started} processes, got one of {accelerator.num_processes}; "
            "on CPUs make it by Accelerator(cpu=True)"
        )
    windows = accelerator.gradient_accumulation_steps
    if windows != 1:
        raise ConfigurationError(
            f"expected an accelerator with gradient_accumulation_steps=1, got {windows}; "
            f"give LoopOptions(accumulate={windows})"
        )
    if batch_size is not None and batch_size < accelerator.num_processes * loop.accumulate:
        raise ConfigurationError(
            f"expected an example for each of {accelerator.num_processes} processes times {loop.accumulate} micro-batches, "
            f"got {batch_size}; use fewer, or a larger batch_size"
        )


def check_sampler(
    sampler: Sampler, source: BatchSource, seed: int, accelerator: Accelerator, loop: LoopOptions
) -> None:
    """Check that a sampler is for the source, and gives each micro-batch of each process separate examples.

    Raises:
        ConfigurationError: it does not.
    """
    if sampler.examples != len(source):
        raise ConfigurationError(
            f"expected a sampler of the source's {len(source)} examples, got one of {sampler.examples}"
        )
    parts, found = accelerator.num_processes * loop.accumulate, len(sampler.parts(0, seed))
    if found != parts:
        raise ConfigurationError(
            f"expected a sampler of {parts} parts, the processes times accumulate={loop.accumulate}, "
            f"got one of {found}; change one of them"
        )


def check_method(method: AdversarialTraining, accelerator: Accelerator, loop: LoopOptions) -> None:
    """Check that a method works with micro-batches, skipped updates and the loss scaler, where there are any.

    Raises:
        ConfigurationError: it does not.
    """
    updates, name = method.maximizer.updates, type(method.maximizer).__name__
    if updates > 1 and loop.accumulate > 1:
        raise ConfigurationError(
            f"expected accumulate=1 with {updates} updates a batch ({name}), got {loop.accumulate}; "
            "each of them takes effect before the next pass"
        )
    if updates > 1 and loop.nonfinite == "skip":
        raise ConfigurationError(
            f"expected nonfinite='raise' with {updates} updates a batch ({name}), got 'skip'; "
            "the first of them cannot be undone"
        )
    if accelerator.scaler is not None and method.nonfinite == "raise":
        raise ConfigurationError(
            "expected AdversarialTraining(…, nonfinite='keep') with a loss scaler, got 'raise'; its first updates overflow"
        )
