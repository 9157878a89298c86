"""Measurements of robustness of trained models of UNITER's tasks on databases, which `advvl evaluate --attack` makes.

    advvl evaluate vqa.yaml --attack pgd,random --radius image=L2:0.5,1 --checkpoints plain.safetensors,villa.safetensors

    REPORT/configuration.yaml               whose folder it is
    REPORT/report.{html,md,json,csv}
    REPORT/measurements/MODEL.safetensors   the measurement of each model
    REPORT/batches/MODEL/0.safetensors      of each batch, until the measurement is whole

A killed evaluation goes on with `--resume`, with the bits of one that never was. Several processes share the batches:
`accelerate launch -m advvl evaluate …`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from advvl.adapters.base import Adapter
from advvl.errors import CheckpointError, ConfigurationError
from advvl.evaluation.measurement import Measurement, versions
from advvl.evaluation.report import write_report
from advvl.evaluation.worst_case import Record, worst_case
from advvl.experiments.attacked_tasks import ATTACKED
from advvl.experiments.config import identity
from advvl.experiments.measure_examples import AttackedExamples
from advvl.experiments.measure_options import EvaluateOptions
from advvl.experiments.outputs import claimed_by_main
from advvl.experiments.records import sha256
from advvl.experiments.train_setup import accelerator_of, check_fit, model_of
from advvl.files import write_safetensors
from advvl.models.uniter.checkpoint import load_checkpoint
from advvl.models.uniter.task import UniterTask
from advvl.runtime.processes import process_count


def measure(options: EvaluateOptions) -> Path:
    """Attack trained models on the val databases, and write measurements and a page; return the page's path.

    Raises:
        ConfigurationError: a task whose answers cannot be attacked, or databases without targets.
        CheckpointError: a file of weights that is missing, or of another task or model.
        OutputDirectoryError: the folder of the report is another configuration's, or holds results without `resume`.
    """
    asked = options.robustness
    if options.task not in ATTACKED:
        raise ConfigurationError(
            f"expected a task of {', '.join(ATTACKED)} to attack, got {options.task}, which has no answers to choose from; "
            "leave out --attack for its losses"
        )
    files = _named(asked.checkpoints or (options.checkpoint or str(Path(options.output) / "best.safetensors"),))
    accelerator = accelerator_of(options)
    model, examples = model_of(options), AttackedExamples.of(options)
    asked.check_answers(options.task, examples.task.least)
    check_fit(model, examples.shards)
    for path in files.values():  # all of them before the first is attacked, which may take hours
        load_checkpoint(model, path)
    surrogate = _surrogate(options, examples, accelerator.device)
    model.to(accelerator.device).eval()
    weights = [*files.values(), *([Path(asked.surrogate)] if asked.surrogate else [])]
    whose = {
        "evaluation": identity(options),
        "weights": [sha256(path) for path in weights],
        "examples": examples.content,
        "versions": versions(),
    }
    folder, main = Path(options.output) / asked.report, accelerator.is_main_process
    choices = {"resume": options.resume, "overwrite": options.overwrite, "results": "*"}
    with claimed_by_main(folder, whose, main=main, **choices):
        measured = {}
        for name, path in files.items():
            load_checkpoint(model, path)
            measured[name] = _measured(options, model, examples, surrogate, folder, name, sha256(path))
            accelerator.wait_for_everyone()  # all have read the batches' files, or the measurement's
            if main:
                measured[name].save(_file(folder, name))
                shutil.rmtree(
                    _batches(folder, name), ignore_errors=True
                )  # a killed run goes on from those of the others
        if main:
            shutil.rmtree(folder / "batches", ignore_errors=True)

            @lru_cache(maxsize=1)  # examples of one model come one after the other
            def trained(name: str) -> UniterTask:
                load_checkpoint(model, files[name])
                return model

            write_report(
                folder,
                measured,
                title=f"Robustness: {options.task}",
                draw=lambda damage: examples.drawn(options, trained(damage.model), surrogate, damage),
                examples=asked.drawn,
            )
        accelerator.wait_for_everyone()
    return folder / "report.html"


def _surrogate(options: EvaluateOptions, examples: AttackedExamples, device: torch.device) -> Adapter | None:
    """The model that transfer attacks are made on, of the same task and sizes."""
    if options.robustness.surrogate is None:
        return None
    (path,) = _named([options.robustness.surrogate]).values()
    model = model_of(options)
    load_checkpoint(model, path)
    return examples.task.adapter(model.to(device).eval())


def _measured(
    options: EvaluateOptions,
    model: UniterTask,
    examples: AttackedExamples,
    surrogate: Adapter | None,
    folder: Path,
    name: str,
    weights: str,
) -> Measurement:
    """Attack one model, but for what an earlier run has found."""
    asked = options.robustness
    if _file(folder, name).exists():
        return Measurement.load(_file(folder, name))
    stored = _batches(folder, name)

    def cache(number: int, make: Callable[[], Record]) -> Record:
        path = stored / f"{number}.safetensors"
        if path.exists():
            return _kept(path)
        found = make()
        write_safetensors(path, {name: tensor.contiguous() for name, tensor in found.items()})
        return found

    return worst_case(
        examples.task.adapter(model),
        examples.batches(next(model.parameters()).device),
        asked.budgets,
        attacks=asked.attacks(surrogate),
        targets=examples.task.targets,
        rows=examples.task.rows,
        seed=options.seed,
        cache=cache,
        over_processes=process_count() > 1,
        about={
            "task": options.task,
            "data": examples.about,
            "chance": examples.chance,
            "weights": weights,
            "surrogate": None if asked.surrogate is None else sha256(Path(asked.surrogate)),
            "configuration": identity(asked),
        },
    )


def _kept(path: Path) -> Record:
    """The record of a batch that an earlier run wrote.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"expected the record of a batch in {str(path)!r}, got {error}; remove the file"
        ) from error


def _file(folder: Path, name: str) -> Path:
    return folder / "measurements" / f"{name.replace('/', '-')}.safetensors"


def _batches(folder: Path, name: str) -> Path:
    return folder / "batches" / name


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """Name files of weights by as many of their last parts as tell them apart.

    Raises:
        CheckpointError: a file that is not there, or the same one twice.
    """
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            raise CheckpointError(
                f"expected a file of weights at {str(path)!r}, got none; give --checkpoints FILE,FILE"
            )
    for parts in range(1, 1 + max(len(path.parts) for path in files)):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in files]
        if len({name.replace("/", "-") for name in names}) == len(files):
            return dict(zip(names, files, strict=True))
    raise CheckpointError(f"expected different files of weights, got {', '.join(map(str, files))}; name each once")
