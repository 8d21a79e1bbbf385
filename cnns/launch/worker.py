"""One process of a job: what it does at its start and end, and how its parent sees it."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cnns.launch import limits
from cnns.launch.channel import MAX_MESSAGE_BYTES, brief
from cnns.launch.job import Job

WORKER_MARK = "CNNS_WORKER"
TAIL_LINES, LINE_BYTES = 60, 2000  # what is kept of a worker's stderr
# gRPC would send OneFlow's own connections through these.
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy")

OWN_ERROR = re.compile(r"[^\s:]+: error: (.+)")  # as config.report writes it
FATAL = re.compile(r"F\d{4,8} [^]]*\] (.*)")  # glog
# Lines of a crash in native code, and the lines with which any crash begins.
NATIVE = re.compile(r"[EF]\d{4,8} \d|\*\*\* |    @ +0x|terminate called|  what\(\)|.*EPOLLERR")
NOT_CAUGHT = re.compile(rf"{NATIVE.pattern}|Traceback \(most|Fatal Python error")
CRASH = re.compile(rf"{NOT_CAUGHT.pattern}|{OWN_ERROR.pattern}")

# Run in front of a worker. The kernel ends the worker when its parent dies, however that dies. The
# check is for a parent that died before the request.
STARTER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Ends what workers have started themselves when the parent is gone and so its end of the pipe is
# closed. A group is named once when it starts and once more when it is over.
GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    groups ^= {int(line)}
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


# What workers see.


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started by `launch`."""
    return WORKER_MARK in environ


def worker_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank of this process; 0 where there is only one."""
    return int(environ["RANK"]) if is_worker(environ) else 0


def worker_local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The device of this process on its node; 0 where there is only one process."""
    return int(environ["LOCAL_RANK"]) if is_worker(environ) else 0


def prepare_worker(environ: Mapping[str, str] = os.environ) -> None:
    """To be called before OneFlow is imported; does nothing in a process that is not a worker.

    Waits until rank 0 listens: OneFlow tries once, and sleeps for 10 s before it tries again. And
    sees to it that an exception ends this process, see `leave`.
    """
    if not is_worker(environ):
        return
    sys.excepthook = die
    if worker_rank(environ) == 0:
        return
    address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    end = time.monotonic() + limits.RANK_0_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection(address, timeout=limits.BEAT_SECONDS).close()
            return
        except OSError:
            time.sleep(limits.TICK_SECONDS)


def die(*exception) -> None:
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
            try:
                file.flush()
            except OSError:  # nobody reads it any more
                pass
        os._exit(status)
    return status


def worker_environ(
    job: Job, rank: int, master: tuple[str, int], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of the worker `rank`; `master` is where rank 0 will listen."""
    result = {name: value for name, value in environ.items() if name not in PROXIES}
    if job.processes_per_node > 1:  # else each process would take all cores
        cores = len(os.sched_getaffinity(0))
        result.setdefault("OMP_NUM_THREADS", str(max(1, cores // job.processes_per_node)))
    result |= {
        WORKER_MARK: "1",
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
        "WORLD_SIZE": str(job.world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - job.ranks[0]),
        "PYTHONUNBUFFERED": "1",
    }
    return result


# Workers.


def signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


class Guard:
    """A process that outlives this one by a moment, to end what the workers have started."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def toggle(self, group: int) -> None:
        try:
            self.process.stdin.write(b"%d\n" % group)
        except BrokenPipeError:  # somebody killed it; the kernel still ends the workers themselves
            pass

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(limits.REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Worker:
    """One process of the job, in a session of its own: the terminal's Ctrl-C does not reach it.

    Of rank 0, stdout is ours, and stderr is passed on line by line, except that lines which look
    like the beginning of a crash wait: what is to be said about a crash comes first. Of other
    ranks, stdout is dropped and the end of stderr kept. A process alone speaks for itself: what it
    says of its errors is passed on like everything else.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        rank: int,
        *,
        alone: bool = False,
        stdin: int | None = subprocess.DEVNULL,
    ):
        self.rank = rank
        self.shown = rank == 0
        self.waits = NOT_CAUGHT if alone else CRASH
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", STARTER, str(os.getpid()), *command],
            env=environ,
            stdin=stdin,
            stdout=None if self.shown else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self.process.pid
        os.set_blocking(self.process.stderr.fileno(), False)
        self.rest = b""  # of a line
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.own_error = self.fatal = ""
        self.out = bytearray()  # to be passed on
        self.holding = False  # everything, for the job is about to end
        self.held: list[bytes] = []
        self.held_since = 0.0

    def read_stderr(self) -> bool:
        """Take what there is; False at the end of the stream."""
        try:
            while data := os.read(self.process.stderr.fileno(), 1 << 16):
                *lines, self.rest = (self.rest + data).split(b"\n")
                for line in lines:
                    self.add_line(line)
                del self.out[:-MAX_MESSAGE_BYTES]  # what nobody has read for long
                if len(self.rest) > LINE_BYTES:
                    self.add_line(self.rest)
                    self.rest = b""
        except BlockingIOError:
            return True
        return False

    def add_line(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode(errors="replace").rstrip("\r")
        self.tail.append(text)
        if match := OWN_ERROR.fullmatch(text):
            self.own_error = match[1]
        elif not self.fatal and (match := FATAL.fullmatch(text)):
            self.fatal = match[1]
        if not self.shown:
            return
        if self.holding or self.held or self.waits.match(text):
            self.held_since = self.held_since if self.held else time.monotonic()
            self.held.append(line)
            del self.held[:-TAIL_LINES]
        else:
            self.out += line + b"\n"

    def release(self, *, native: bool = True) -> None:
        """Pass on what was held back; without the native lines if told so."""
        for line in self.held:
            if native or not NATIVE.match(line.decode(errors="replace")):
                self.out += line + b"\n"
        self.held.clear()

    def last_words(self) -> tuple[str, ...]:
        """What it said from where a crash begins; else all that is kept and was not shown."""
        lines = tuple(self.tail)
        begin = len(lines) if self.rank == 0 else 0
        return lines[next((i for i, line in enumerate(lines) if CRASH.match(line)), begin) :]

    def pass_on(self, *, wait: bool = False) -> None:
        """Write to our stderr what it takes without waiting: a paused terminal must not stop us."""
        try:
            while self.out and (wait or select.select([], [2], [], 0)[1]):
                del self.out[: os.write(2, self.out[:512])]
        except OSError:  # nobody reads it any more
            self.out.clear()

    def poll(self) -> int | None:
        """The exit status if it has ended, negative for a signal; its children end with it."""
        if self.process.returncode is not None:
            return self.process.returncode
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        signal_group(self.pid, signal.SIGKILL)  # before it is reaped: until then the number is ours
        code = self.process.wait()
        self.read_stderr()
        if self.rest:
            self.add_line(self.rest)
            self.rest = b""
        return code


# Why a job ends.


@dataclass(frozen=True)
class Exit:
    """How a worker ended: its status, negative for a signal, and what its stderr said of it."""

    rank: int
    code: int
    own_error: str = ""
    fatal: str = ""
    tail: tuple[str, ...] = ()
    is_explained: bool = False  # `own_error` is not its own, but what is known of its crash

    @property
    def is_abort(self) -> bool:
        return self.code == -signal.SIGABRT

    def describe(self, who: str) -> str:
        if self.code > 0:
            if self.own_error:
                return f"{who}: {brief(self.own_error, 500)}"
            last = next((line for line in reversed(self.tail) if line.strip()), "")
            if any(line.startswith("Traceback (most") for line in self.tail):
                return f"{who} failed: {brief(last, 500)}"
            return f"{who} ended with exit status {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            name = f"signal {-self.code}"
        hint = f": {brief(self.fatal, 300)}" if self.fatal else ""
        if self.code == -signal.SIGKILL:
            hint = " (out of memory?)"
        return f"{who} was killed by {name}{hint}"


def command(script: str, argv: list[str] | None) -> list[str]:
    """What starts a script once more, as a worker; `argv` as its `main` got it."""
    return [sys.executable, *(sys.argv if argv is None else [script, *argv])]
