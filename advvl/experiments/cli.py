"""The command `advvl`: tasks on databases, experiments that train, attack and report, and tools for data and models.

What a command needs is imported when it runs, so that help need not wait for it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from advvl import __version__
from advvl.errors import AdvVLError

_TOOLS = {
    "train": (
        "train a task of UNITER on its databases, standard or adversarially",
        "advvl.experiments.task_commands:train_command",
    ),
    "evaluate": (
        "score trained models on the databases of their task, clean or under attack",
        "advvl.experiments.task_commands:evaluate_command",
    ),
    "predict": (
        "write a trained model's predictions as the task's server takes them",
        "advvl.experiments.task_commands:predict_command",
    ),
    "report": (
        "make a page of measurements that advvl evaluate --attack wrote",
        "advvl.experiments.report_tool:report_tool",
    ),
    "data": (
        "convert your own data to UNITER's databases, or say what a database holds",
        "advvl.experiments.data_tool:data_tool",
    ),
    "sites": (
        "list the tensors of a model of transformers that could be perturbed",
        "advvl.experiments.site_table:site_table",
    ),
}
_EXPERIMENTS = {
    "villa-uniter": (
        "pre-train, fine-tune and attack a tiny UNITER, with and without adversarial training",
        "advvl.experiments.uniter:UNITER",
    ),
    "villa-lxmert": (
        "train LXMERT on VQA's files or on digits, with and without adversarial training, and attack it",
        "advvl.experiments.lxmert:LXMERT",
    ),
    "colors": (
        "the same on people's words for colours, from a copy of Colors in Context",
        "advvl.experiments.colors:COLORS",
    ),
    "nlvr": (
        "the same on people's statements about boxes of objects, from a copy of NLVR",
        "advvl.experiments.nlvr:NLVR",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return the exit status, 2 for what a person can put right."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    known = _TOOLS | _EXPERIMENTS
    if name in ("-h", "--help"):
        print("usage: advvl COMMAND [option ...]\n")
        print("Adversarial training and attacks in the embedding space of vision-and-language models.\n\ncommands:")
        print("\n".join(f"  {command:14} {text}" for command, (text, _) in known.items()))
        print(
            "\noptions:\n  --version      print the version\n  -h, --help     print this; after a command, its options"
        )
        return 0
    if name == "--version":
        print(f"advvl {__version__}")
        return 0
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        print(
            f"error: expected a command of {', '.join(known)}, got {name[:80]!r}; the nearest is {nearest}",
            file=sys.stderr,
        )
        return 2
    description, place = known[name]
    module, attribute = place.split(":")
    found = getattr(import_module(module), attribute)
    if name in _TOOLS:
        return exit_status(lambda: found(rest))
    return command(found, description, rest, prog=f"advvl {name}")


def command(
    experiment: Any, description: str | None, arguments: Sequence[str] | None = None, *, prog: str | None = None
) -> int:
    """Run an experiment by its command line; return the exit status.

    Arguments:
        experiment: an `advvl.experiments.experiment.Experiment`.
        description: of the command, for `--help`.
        arguments: None: the process's own.
        prog: the command's name, for `--help`; None: the script's.
    """
    from advvl.experiments.command_line import parse
    from advvl.experiments.runner import run

    said = {"presets": experiment.presets, "description": description, "prog": prog}
    return exit_status(lambda: run(experiment, parse(experiment.options, arguments, **said)))


def exit_status(work: Callable[[], object]) -> int:
    """Do the work; return 0, or 2 with a message instead of a traceback for what a person can put right."""
    try:
        work()
    except AdvVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0
