"""Worker processes that share the work and do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from advvl.errors import AdvVLError

Handle = Callable[[Any], None]


class WorkerError(AdvVLError, RuntimeError):
    """A worker process ended before its work was done; what it had said is on its standard error."""


def work_through(
    open_worker: Callable[..., AbstractContextManager[Handle]], items: Sequence[Any], *arguments: Any, jobs: int
) -> None:
    """Do as `share_out` does; in this very process, where one is enough."""
    if jobs > 1 and len(items) > 1:
        share_out(open_worker, items, *arguments, jobs=jobs)
        return
    with open_worker(0, *arguments) as handle:
        for item in items:
            handle(item)


def share_out(
    open_worker: Callable[..., AbstractContextManager[Handle]], items: Sequence[Any], *arguments: Any, jobs: int
) -> None:
    """Have `jobs` processes take the items in order, each the next when it is done with its last, and wait for all.

    In worker number i `with open_worker(i, *arguments) as handle` is entered once, and `handle(item)` called for each
    item it takes. `open_worker` must be importable. If a worker fails, or this process gets SIGTERM, the others get
    it and are waited for; if this process is killed outright, they get it too.

    Raises:
        WorkerError: a worker failed.
        SystemExit: a worker was stopped by a signal; with its status.
    """
    context = multiprocessing.get_context("spawn")
    count = min(jobs, len(items))
    taken = context.Value("i", 0)
    workers = [context.Process(target=_work, args=(open_worker, items, taken, i, *arguments)) for i in range(count)]
    with _terminated_at_exit(workers):
        for worker in workers:
            worker.start()
        waiting = list(workers)
        while waiting:
            ended = wait([worker.sentinel for worker in waiting])
            for worker in [worker for worker in waiting if worker.sentinel in ended]:
                waiting.remove(worker)
                worker.join()
                if worker.exitcode in _STOPPED:
                    raise SystemExit(worker.exitcode)
                if worker.exitcode:
                    raise WorkerError(
                        f"expected every worker to finish, got exit status {worker.exitcode} from one; see what it said "
                        "above, and go on with --resume"
                    )


_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@contextmanager
def _terminated_at_exit(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """SIGTERM raises SystemExit within; at the end, workers still alive get SIGTERM and are waited for."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _leave) if main else None
    try:
        yield
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        for worker in workers:
            if worker.pid is not None:
                worker.join()
        if main:
            signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _work(
    open_worker: Callable[..., AbstractContextManager[Handle]],
    items: Sequence[Any],
    taken: Synchronized[int],
    index: int,
    *arguments: Any,
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        with open_worker(index, *arguments) as handle:
            while (number := _next(taken)) < len(items):
                handle(items[number])
    except AdvVLError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def _next(taken: Synchronized[int]) -> int:
    with taken.get_lock():
        number = taken.value
        taken.value = number + 1
    return number


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
