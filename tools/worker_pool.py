"""Tasks spread over processes, with progress, and nobody left behind.

Workers are forks, which start at once; where the parent runs threads or has loaded OneFlow, which
does not survive a fork, they are fresh interpreters. Each has a pipe of its own. A worker whose
parent is gone, by SIGKILL too, finds its pipe broken and ends; a parent whose worker is gone raises
an error.
"""

import itertools
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection

from cnns.errors import RunError

REPORT_SECONDS = 0.1  # between a worker's reports of progress
LINE_SECONDS = 30.0  # between lines of progress in a log

Advance = Callable[[int], object]  # called with the number of examples just done
Task = Callable[[Advance], object]  # returns what `run_tasks` yields for it


class Progress:
    """A bar on a terminal; elsewhere a line now and then. Both on stderr."""

    def __init__(self, total: int, *, unit: str = "images"):
        self.total, self.unit, self.count = total, unit, 0
        self.started = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # here, as workers have no use for it

            tqdm.monitor_interval = 0  # no thread, so that workers can be forks
            form = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}
            self.bar = tqdm(total=total, dynamic_ncols=True, **form)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def print(self, line: str) -> None:
        """Print a line of results without tearing the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)

    def advance(self, count: int = 1) -> None:
        self.count += count
        if self.bar is not None:
            self.bar.update(count)
            return
        now = time.monotonic()
        if now - self.printed >= LINE_SECONDS:
            self.printed = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        rate = self.count / (now - self.started)
        left = (self.total - self.count) / rate if rate else 0.0
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{self.count} of {self.total} {self.unit}, {rate:.0f} {self.unit}/s, "
            f"{hours}:{minutes:02d}:{seconds:02d} left"
        )


def serve(pipe, inherited) -> None:
    """The life of a worker: one task after the other, until the pipe ends."""
    for end in inherited:  # a pipe ends when nobody holds its other end
        end.close()
    pending, reported = 0, time.monotonic()

    def advance(count: int = 1) -> None:
        nonlocal pending, reported
        pending += count
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS:
            pipe.send(("progress", pending))
            pending, reported = 0, now

    try:
        while True:
            number, task = pipe.recv()
            try:
                answer = ("result", (number, task(advance)))
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                answer = ("error", error)
            except Exception as error:
                answer = ("error", error)
            if pending:
                pipe.send(("progress", pending))
                pending = 0
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def run_tasks(
    tasks: Iterable[Task], *, num_workers: int, advance: Advance
) -> Iterator[tuple[int, object]]:
    """Yield (number, result) of each task as it is done; the numbers count the tasks from 0.

    With one worker the tasks run in this process, in order; with more they have to be picklable,
    and are started in order. A task is only drawn from `tasks` when a worker is free for it.
    An exception in a task is raised here, and the other workers are ended.
    """
    if num_workers == 1:
        for number, task in enumerate(tasks):
            yield number, task(advance)
        return
    waiting = enumerate(tasks)
    method = "spawn" if "oneflow" in sys.modules or threading.active_count() > 1 else "fork"
    context = multiprocessing.get_context(method)
    workers = {}  # pipe -> process; busy ones only, between rounds
    try:
        first = list(itertools.islice(waiting, num_workers))
        for _ in first:
            pipe, theirs = context.Pipe()
            inherited = (*workers, pipe) if method == "fork" else ()
            process = context.Process(target=serve, args=(theirs, inherited), daemon=True)
            workers[pipe] = process
            # Ctrl-C reaches the whole group. Workers inherit the mask, so that it never gets
            # through to them, and it arrives here a moment later.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        for pipe, item in zip(workers, first, strict=True):
            pipe.send(item)
        while workers:
            for pipe in connection.wait(list(workers)):
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    workers[pipe].join()
                    raise RunError(
                        f"a worker process ended (exit code {workers[pipe].exitcode}); if the "
                        "system was short of memory, give fewer --num_workers"
                    ) from None
                if kind == "progress":
                    advance(value)
                    continue
                if kind == "error":
                    raise value
                yield value
                item = next(waiting, None)
                if item is not None:
                    pipe.send(item)
                else:
                    pipe.close()
                    workers.pop(pipe).join()
    finally:
        for pipe, process in workers.items():
            if process.pid is not None:
                process.kill()
                process.join()
            pipe.close()
