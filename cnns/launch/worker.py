"""One process of a job: what it does at its start and end, and how its parent sees it."""

import asyncio
import errno
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Full, Queue
from threading import Thread
from typing import Any

from cnns.errors import forget
from cnns.interrupts import STATUSES
from cnns.launch import control
from cnns.launch.channel import brief
from cnns.launch.job import Job
from cnns.launch.terminal import ERASE

RANK_0_SECONDS = 120.0  # for rank 0 to import OneFlow, before the others do so anyway
WORKER_MARK = "CNNS_WORKER"
TAIL_LINES, LINE_BYTES = 100, 1000  # what is kept of a worker's stderr; fits into one message
MAX_WAITING_LINES = 10_000  # that nobody has read yet
HOLD_SECONDS = 5.0  # a line that may belong to a crash waits so long to see whether one follows
# gRPC would send OneFlow's own connections through these.
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy")

OWN_ERROR = re.compile(r"[^\s:]+: error: (.+)")  # as cnns.errors.report writes it
FATAL = re.compile(r"F\d{4,8} [^]]*\] (.*)")  # glog
# Lines of a crash in native code, and the lines with which any crash begins.
NATIVE = re.compile(r"[EF]\d{4,8} \d|\*\*\* |    @ +0x|terminate called|  what\(\)|.*EPOLLERR")
NOT_CAUGHT = re.compile(rf"{NATIVE.pattern}|Traceback \(most|Fatal Python error")
CRASH = re.compile(rf"{NOT_CAUGHT.pattern}|{OWN_ERROR.pattern}")

# Run in front of a worker. The kernel kills the worker when its parent dies, however that dies; a
# child of the worker, which the kernel wakes when the worker dies, kills what else the worker has
# started. Each checks once for a parent that died before it asked.
STARTER = """
import ctypes, os, signal, sys
set_death_signal = lambda number: ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
set_death_signal(signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
worker = os.getpid()
before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
if os.fork() == 0:
    set_death_signal(signal.SIGUSR1)
    while os.getppid() == worker:
        signal.sigwait([signal.SIGUSR1])
    os.killpg(worker, signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_SETMASK, before)
os.execvp(sys.argv[2], sys.argv[2:])
"""


# In a worker.


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started by `launch`."""
    return WORKER_MARK in environ


def prepare_worker() -> None:
    """To be called before OneFlow is imported; does nothing in a process that is not a worker.

    Waits until rank 0 listens: OneFlow tries once, and sleeps for 10 s before it tries again. And
    sees to it that an exception ends this process, see `leave`.
    """
    if not is_worker():
        return
    sys.excepthook = end_by_exception
    control.attach()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + RANK_0_SECONDS
    while os.environ["RANK"] != "0" and time.monotonic() < end:
        try:
            socket.create_connection(address, timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.1)


def end_by_exception(*exception: Any) -> None:
    """Print an uncaught exception as Python does, and leave."""
    sys.__excepthook__(*exception)
    if not issubclass(exception[0], KeyboardInterrupt):
        leave(1)


def leave(status: int) -> int:
    """In a worker that has failed, exit with `status` at once; else return it.

    The end of OneFlow's graphs, and its own, wait for all other processes, which wait in turn for
    what this one no longer sends. Workers that were interrupted have waited for one another before.
    """
    if is_worker() and status != 0:
        for file in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                file.flush()
        control.leave(status)
    return status


# In its parent.


def command(script: str, argv: list[str] | None) -> list[str]:
    """What starts a script once more, as a worker; `argv` as its `main` got it."""
    return [sys.executable, *(sys.argv if argv is None else [script, *argv])]


def worker_environ(job: Job, rank: int, master: tuple[str, int]) -> dict[str, str]:
    """The environment of the worker `rank`; `master` is where rank 0 will listen."""
    environ = {name: value for name, value in os.environ.items() if name not in PROXIES}
    if job.processes_per_node > 1:  # else each process would take all cores
        cores = len(os.sched_getaffinity(0))
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // job.processes_per_node)))
    return environ | {
        WORKER_MARK: "1",
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
        "WORLD_SIZE": str(job.world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - job.ranks[0]),
        "PYTHONUNBUFFERED": "1",
    }


# OneFlow aborts when another process dies, so an abort explains least.
END_BY_ERROR, END_BY_SIGNAL, END_BY_ABORT = range(3)


@dataclass(frozen=True)
class End:
    """How a job ends: the exit status of its parents, and the line that each prints."""

    status: int
    text: str = ""
    tail: Sequence[str] = ()  # what the worker that is the cause said last
    by: int = END_BY_SIGNAL  # of several causes the lowest explains the end, then the first
    at_once: bool = False  # SIGKILL without SIGTERM, and no node is waited for


Explain = Callable[[int, Sequence[str]], str | None]  # number on this node, last words


def signal_name(number: int) -> str:
    names = {each.value: each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")


class Worker:
    """One process of the job, in a session of its own: the terminal's Ctrl-C does not reach it.

    Of rank 0, stdout is ours, and stderr is passed on line by line, except that lines which look
    like the beginning of a crash wait: what is to be said about a crash comes first. Of other
    ranks, stdout is dropped and the end of stderr kept. A process alone speaks for itself: what it
    says of its errors is passed on like everything else.
    """

    def __init__(self, process: Any, *, job: Job, rank: int, has_bar: bool = False):
        self.process, self.job, self.rank = process, job, rank  # subprocess.Popen, or alike
        self.before_line = ERASE.encode() if has_bar else b""
        self.is_alone = job.world_size == 1
        self.is_shown = rank == 0
        self.stderr = process.stderr
        os.set_blocking(self.stderr.fileno(), False)
        self.rest = b""  # of a line
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.held: list[bytes] | None = None  # all lines from one on that looks like a crash
        self.is_ending = False  # the job; what is held waits for the reason
        # A thread prints, so that a paused terminal does not stop this process.
        self.to_print: Queue[bytes | None] = Queue(MAX_WAITING_LINES)
        self.printer = Thread(target=self.print_lines, daemon=True)
        self.printer.start()

    def print_lines(self) -> None:
        while (line := self.to_print.get()) is not None:
            try:
                sys.stderr.buffer.write(self.before_line + line)
                sys.stderr.buffer.flush()
            except OSError as error:  # nobody reads it any more
                if error.errno == errno.EIO:
                    forget(sys.stderr)

    def read_stderr(self) -> bool:
        """Take what there is; False at the end of the stream."""
        try:
            while data := os.read(self.stderr.fileno(), 1 << 16):
                *lines, self.rest = (self.rest + data).split(b"\n")
                for line in lines:
                    self.add_line(line + b"\n")
                if len(self.rest) > LINE_BYTES:
                    self.flush()
        except BlockingIOError:
            return True
        return False

    def flush(self) -> None:
        if self.rest:
            self.add_line(self.rest + b"\n")
            self.rest = b""

    def add_line(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode(errors="replace").rstrip("\r\n")
        self.tail.append(text)
        if not self.is_shown:
            return
        if (NOT_CAUGHT if self.is_alone else CRASH).match(text):
            self.hold()
        if self.held is not None:
            self.held.append(line)
        else:
            self.print(line)

    def print(self, line: bytes) -> None:
        with suppress(Full):
            self.to_print.put_nowait(line)

    def hold(self) -> None:
        """Keep further lines until it is clear whether this is a crash."""
        if self.held is None:
            self.held = []
            loop = asyncio.get_running_loop()
            loop.call_later(HOLD_SECONDS, self.release_unless_ending)

    def release_unless_ending(self) -> None:
        if not self.is_ending:
            self.release()

    def release(self, *, native: bool = True) -> None:
        """Print what was held; without the native lines if told so."""
        for line in self.held or ():
            if native or not NATIVE.match(line.decode(errors="replace")):
                self.print(line)
        self.held = None

    def finish_printing(self) -> None:
        self.to_print.put(None)
        self.printer.join()

    def signal_group(self, number: int) -> None:
        """Signal the worker and what it has started."""
        if self.process.returncode is None:  # until it is reaped, the number is its own
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def last_words(self) -> list[str]:
        """What it said from where a crash begins; else all that is kept and was not shown."""
        lines = list(self.tail)
        begin = len(lines) if self.is_shown else 0
        return lines[next((i for i, line in enumerate(lines) if CRASH.match(line)), begin) :]

    def outcome(self, code: int, explain: Explain) -> End:
        """What the end of this worker with the status `code` means for the job."""
        if code in (0, *STATUSES):
            return End(code)
        words = self.last_words()
        known = explain(self.rank - self.job.ranks[0], words)
        if self.is_alone and (known or code > 0):  # else it has said so itself
            return End(1, known) if known else End(code)
        status = 2 if code == 2 and not known else 1
        who = "the process" if self.is_alone else self.job.name_rank(self.rank)
        after = "" if self.is_alone else "; all processes were ended"
        errors = [match[1] for line in words if (match := OWN_ERROR.fullmatch(line))]
        if known or code > 0 and errors:
            text = known or errors[-1]
            return End(status, f"{who}: {brief(text, 500)}{after}", by=END_BY_ERROR)
        if code > 0:
            what = f"ended with exit status {code}"
            if any(line.startswith("Traceback (most") for line in words):
                what = f"failed: {brief(next(filter(str.strip, reversed(words))), 500)}"
            return End(status, f"{who} {what}{after}", words)
        what = f"was killed by {signal_name(-code)}"
        fatal = next((match[1] for line in words if (match := FATAL.fullmatch(line))), "")
        if code == -signal.SIGKILL:
            what, words = f"{what} (out of memory?)", []
        elif fatal:
            what = f"{what}: {brief(fatal, 300)}"
        by = END_BY_ABORT if code == -signal.SIGABRT else END_BY_SIGNAL
        return End(status, f"{who} {what}{after}", words, by)
