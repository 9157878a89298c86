"""The command `advvl`: `advvl villa-uniter …` trains, attacks and reports; see `advvl.experiment`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from advvl.errors import AdvVLError
from advvl.experiment import run
from advvl.flags import parse
from advvl.options import PRESETS, ExperimentOptions

_COMMANDS = {"villa-uniter": "pre-train, fine-tune and attack a tiny UNITER, with and without adversarial training"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; the exit status: 2 for what a person can put right."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: advvl COMMAND [--help] [option ...]\n")
        print("\n".join(f"  {name:14} {text}" for name, text in _COMMANDS.items()))
        return 0
    if command not in _COMMANDS:
        print(
            f"error: expected a command of {', '.join(_COMMANDS)}, got {command!r}; see advvl --help", file=sys.stderr
        )
        return 2
    description = _COMMANDS[command]
    return exit_status(lambda: run(parse(ExperimentOptions, rest, presets=PRESETS, description=description)))


def exit_status(work: Callable[[], object]) -> int:
    """Do the work; 0, or 2 with a message instead of a traceback for what a person can put right."""
    try:
        work()
    except AdvVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0
