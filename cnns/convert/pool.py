"""Tasks spread over processes, with progress, and no process left behind.

Each task has a process of its own. It is a fork, which starts at once, unless the parent runs
threads or has loaded OneFlow, which does not survive a fork. A pool of concurrent.futures forks
beside a thread of its own, cannot be stopped in the middle of a task, and leaves its workers behind
when the parent is killed.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tqdm import tqdm

from cnns.errors import RunError
from cnns.interrupts import SIGNALS

PR_SET_PDEATHSIG = 1  # linux/prctl.h
REPORT_SECONDS = 0.1  # between a worker's reports of progress
LINE_SECONDS = 30.0  # between lines of progress in a log

Advance = Callable[[int], object]  # called with the number of examples just done
Result = TypeVar("Result")
Task = Callable[[Advance], Result]  # returns what `run_tasks` yields for it


class Progress:
    """A bar on a terminal; elsewhere a line now and then. Both on stderr."""

    def __init__(self, total: int, *, unit: str = "images"):
        self.total, self.unit, self.count = total, unit, 0
        self.started = self.printed = time.monotonic()
        tqdm.monitor_interval = 0  # no thread, so that workers can be forks
        form = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}
        self.bar = tqdm(total=total, dynamic_ncols=True, disable=not sys.stderr.isatty(), **form)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def print(self, line: str) -> None:
        """Print a line of results without tearing the bar."""
        self.bar.clear()
        print(line, flush=True)

    def advance(self, count: int = 1) -> None:
        self.count += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.printed >= LINE_SECONDS:
            self.printed = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        rate = self.count / (now - self.started)
        left = timedelta(seconds=round((self.total - self.count) / rate if rate else 0))
        return f"{self.count} of {self.total} {self.unit}, {rate:.0f} {self.unit}/s, {left} left"


def work(task: Task[object], pipe: connection.Connection, parent: int) -> None:
    """Run a task in a worker: sends (count, None, None) now and then, last a result or an error."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before that
        return
    pending, reported = 0, time.monotonic()

    def advance(count: int = 1) -> None:
        nonlocal pending, reported
        pending += count
        if time.monotonic() - reported >= REPORT_SECONDS:
            pipe.send((pending, None, None))
            pending, reported = 0, time.monotonic()

    try:
        result, error = (task(advance),), None
    except Exception as caught:
        result, error = None, caught
    pipe.send((pending, result, error))


def run_tasks(
    tasks: Iterable[Task[Result]], *, num_workers: int, advance: Advance
) -> Generator[tuple[int, Result], None, None]:
    """Yield (number, result) of each task as it is done; the numbers count the tasks from 0.

    With one worker the tasks run in this process, in order; with more they are started in order. A
    task is only drawn from `tasks` when a worker is free for it. An exception in a task is raised
    here, and the other workers are ended.
    """
    waiting = enumerate(tasks)
    if num_workers == 1:
        for number, task in waiting:
            yield number, task(advance)
        return
    method = "spawn" if "oneflow" in sys.modules or threading.active_count() > 1 else "fork"
    context: Any = multiprocessing.get_context(method)
    workers: dict[connection.Connection, tuple[int, BaseProcess]] = {}
    try:
        while True:
            for number, task in itertools.islice(waiting, num_workers - len(workers)):
                pipe, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=work, args=(task, theirs, os.getpid()), daemon=True
                )
                workers[pipe] = number, process
                # Terminals and schedulers signal the whole process group. Workers inherit the mask,
                # so that none ends of it before this process knows why; it is delivered here a
                # moment later, and they end with this process.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                theirs.close()
            if not workers:
                return
            ready: Any = connection.wait(list(workers))  # some of these connections
            for pipe in ready:
                number, process = workers[pipe]
                try:
                    count, result, error = pipe.recv()
                except EOFError:
                    process.join()
                    raise RunError(
                        f"a worker process ended (exit code {process.exitcode}); if the system was "
                        "short of memory, give fewer --num_workers"
                    ) from None
                advance(count)
                if error is not None:
                    raise error
                if result is not None:
                    del workers[pipe]
                    pipe.close()
                    process.join()
                    yield number, *result
    finally:
        for pipe, (_, process) in workers.items():
            if process.pid is not None:
                process.kill()
                process.join()
            pipe.close()
