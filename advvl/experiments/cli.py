"""The command `advvl`: `advvl villa-uniter …` or `advvl villa-lxmert …` trains, attacks and reports.

The experiments are imported when they run, so that help need not wait for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from advvl.errors import AdvVLError

Arguments = Sequence[str]


def _villa_uniter(arguments: Arguments) -> None:
    from advvl.experiments.flags import parse
    from advvl.experiments.options import PRESETS, ExperimentOptions
    from advvl.experiments.uniter import run

    run(parse(ExperimentOptions, arguments, presets=PRESETS, description=_COMMANDS["villa-uniter"][0]))


def _villa_lxmert(arguments: Arguments) -> None:
    from advvl.experiments.flags import parse
    from advvl.experiments.lxmert import run
    from advvl.experiments.lxmert_options import PRESETS, LxmertOptions

    run(parse(LxmertOptions, arguments, presets=PRESETS, description=_COMMANDS["villa-lxmert"][0]))


_COMMANDS: dict[str, tuple[str, Callable[[Arguments], None]]] = {
    "villa-uniter": (
        "pre-train, fine-tune and attack a tiny UNITER, with and without adversarial training",
        _villa_uniter,
    ),
    "villa-lxmert": (
        "train LXMERT on VQA's files or on digits, with and without adversarial training, and attack it",
        _villa_lxmert,
    ),
}


def main(arguments: Arguments | None = None) -> int:
    """Run the command that the arguments name; the exit status: 2 for what a person can put right."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: advvl COMMAND [--help] [option ...]\n")
        print("\n".join(f"  {name:14} {text}" for name, (text, _) in _COMMANDS.items()))
        return 0
    if command not in _COMMANDS:
        print(
            f"error: expected a command of {', '.join(_COMMANDS)}, got {command!r}; see advvl --help", file=sys.stderr
        )
        return 2
    return exit_status(lambda: _COMMANDS[command][1](rest))


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
