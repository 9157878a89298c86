"""The command `advvl`: `advvl villa-uniter …` or `advvl villa-lxmert …` trains, attacks and reports.

The experiments are imported when they run, so that help need not wait for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from advvl.errors import AdvVLError

_COMMANDS = {
    "villa-uniter": (
        "pre-train, fine-tune and attack a tiny UNITER, with and without adversarial training",
        "advvl.experiments.uniter:UNITER",
    ),
    "villa-lxmert": (
        "train LXMERT on VQA's files or on digits, with and without adversarial training, and attack it",
        "advvl.experiments.lxmert:LXMERT",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return the exit status, 2 for what a person can put right."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: advvl COMMAND [--help] [option ...]\n")
        print("\n".join(f"  {known:14} {text}" for known, (text, _) in _COMMANDS.items()))
        return 0
    if name not in _COMMANDS:
        print(f"error: expected a command of {', '.join(_COMMANDS)}, got {name!r}; see advvl --help", file=sys.stderr)
        return 2
    description, place = _COMMANDS[name]
    module, attribute = place.split(":")
    return command(getattr(import_module(module), attribute), description, rest)


def command(experiment: Any, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run an experiment by its command line; return the exit status.

    Arguments:
        experiment: an `advvl.experiments.experiment.Experiment`.
        description: of the command, for `--help`.
        arguments: None: the process's own.
    """
    from advvl.experiments.flags import parse
    from advvl.experiments.runner import run

    options, presets = experiment.options, experiment.presets
    return exit_status(lambda: run(experiment, parse(options, arguments, presets=presets, description=description)))


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
