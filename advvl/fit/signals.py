"""Signals that wait for a moment at which stopping loses nothing."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Caught:
    """The signal that arrived, or 0."""

    signal: int = 0

    def leave_if_any(self, message: str) -> None:
        """If a signal arrived, print `message` and raise `SystemExit` with the customary status of 128 + signal."""
        if self.signal:
            print(message, file=sys.stderr, flush=True)
            raise SystemExit(128 + self.signal)


@contextmanager
def deferred_signals() -> Iterator[Caught]:
    """Inside this context the first SIGINT and every SIGTERM is recorded instead of obeyed; the second SIGINT is obeyed.

    Processes stopped as a group receive SIGTERM several times: from the scheduler, and from the launcher. Only the main
    thread of Python can do this; elsewhere nothing is changed. A signal that is ignored stays ignored.
    """
    caught = Caught()
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        caught.signal = number
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None and handler is not signal.SIG_IGN:
                before[number] = handler
                signal.signal(number, note)
    try:
        yield caught
    finally:
        _restore(before)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
