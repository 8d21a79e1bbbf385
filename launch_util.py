"""Start one process per device here, join the other nodes, watch them, end them all together.

One parent runs on each node, started by the same command. The parent of node 0 listens on
--ctrl_port; the others connect and say what they found on their machine. When all have come and
agree, each parent starts its workers: the same script once more, with the environment variables
from which OneFlow learns its rank. From then on the parents send one another a sign of life every
second.

The parent of node 0 decides when and how a job ends and tells the others. A parent that hears
nothing from it ends by itself. Nothing here needs OneFlow.
"""

import ipaddress
import json
import os
import re
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import config
from config import RunError, UsageError

WORKER_MARK = "OF_CNN_WORKER"
MAGIC = "of_cnn launch"
PROTOCOL = 1  # of the messages between parents; another one is another job's business
MAX_MESSAGE_BYTES = 1 << 20
MAX_STRANGERS = 32  # connections that have not said who they are
TAIL_LINES, LINE_BYTES = 60, 2000  # what is kept of a worker's stderr

TICK_SECONDS = 0.1
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0  # a node not heard of for so long is lost
HELLO_SECONDS = 5.0  # a connection that has not said by then who it is gets closed
RANK_0_SECONDS = 120.0  # for rank 0 to import OneFlow, before the others do so anyway
TELL_SECONDS = 10.0  # node 0 stays so long to tell nodes that are still to come why it ended
GATHER_SECONDS = (
    1.5  # after a death: others may turn out to have died first, or for a better reason
)
TERM_SECONDS = 1.5  # between SIGTERM and SIGKILL
REAP_SECONDS = 5.0  # for processes to be gone after SIGKILL, and other nodes to say so
HOLD_SECONDS = 5.0  # a line that may belong to a crash waits so long to see whether one follows
STOP_SECONDS = 300.0  # for workers to finish after SIGINT or SIGTERM; saving takes a while
SAME_SIGNAL_SECONDS = 1.0  # `timeout` and schedulers send a signal to the process and to its group

# A scheduler's number of this node, and the number of nodes (one process on each) that it counts.
SCHEDULERS = (
    ("SLURM_NODEID", "SLURM_NNODES"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PBS_NODENUM", "PBS_NUM_NODES"),
)
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


# Who takes part.


@dataclass(frozen=True)
class Job:
    """What a parent knows of the job from its flags. `node_ips` may be empty for one node."""

    num_nodes: int = 1
    node_rank: int = 0
    node_ips: tuple[str, ...] = ()
    processes_per_node: int = 1
    ctrl_port: int = 50051
    start_timeout: float = 120.0  # seconds

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.processes_per_node

    @property
    def ranks(self) -> range:
        """The ranks of this node's workers."""
        first = self.node_rank * self.processes_per_node
        return range(first, first + self.processes_per_node)

    def node(self, node_rank: int) -> str:
        """A node as messages name it."""
        address = f" ({self.node_ips[node_rank]})" if self.node_ips else ""
        return f"node {node_rank}{address}"

    def rank(self, rank: int) -> str:
        return f"rank {rank} on {self.node(rank // self.processes_per_node)}"

    @property
    def flags(self) -> dict:
        """The flags that have to be the same on every node."""
        return {
            "--num_nodes": self.num_nodes,
            "--node_ips": ",".join(self.node_ips),
            "--gpu_num_per_node": self.processes_per_node,
        }


def make_job(
    *,
    num_nodes: int,
    node_ips: Sequence[str] | None,
    processes_per_node: int,
    ctrl_port: int,
    node_rank: int | None = None,
    start_timeout: float = 120.0,
    environ: Mapping[str, str] = os.environ,
) -> Job:
    """The job of these flags, seen from this machine. Raises UsageError where they do not fit."""
    node_ips = tuple(node_ips or ())
    if num_nodes > 1 and not node_ips:
        raise UsageError(
            f"--num_nodes={num_nodes} needs --node_ips: the addresses of all nodes, node 0 first, "
            "joined by commas, the same on every node"
        )
    if node_ips:
        check_addresses(num_nodes, node_ips)
    if node_rank is not None and not 0 <= node_rank < num_nodes:
        raise UsageError(
            f"--node_rank={node_rank} must be at least 0 and less than --num_nodes={num_nodes}"
        )
    if num_nodes == 1:
        node_rank = 0
    return Job(
        num_nodes=num_nodes,
        node_rank=find_node_rank(node_ips, node_rank, environ),
        node_ips=node_ips,
        processes_per_node=processes_per_node,
        ctrl_port=ctrl_port,
        start_timeout=start_timeout,
    )


def check_addresses(num_nodes: int, node_ips: Sequence[str]) -> None:
    listed = ",".join(node_ips)
    if len(node_ips) != num_nodes:
        raise UsageError(
            f"--node_ips={listed} has {len(node_ips)} addresses and --num_nodes is {num_nodes}; "
            "they must agree"
        )
    twice = [ip for i, ip in enumerate(node_ips) if ip in node_ips[:i]]
    if twice:
        raise UsageError(f"--node_ips={listed} names {twice[0]} twice; give each node its own")
    for ip in node_ips:
        try:
            address = ipaddress.ip_address(ip)
        except ValueError:  # a host name
            continue
        if address.version != 4:  # its bootstrap server checks the peer's family, and aborts
            raise UsageError(
                f"--node_ips: {ip} is no IPv4 address, and OneFlow 0.9.0 uses no other"
            )
        if address.is_unspecified or address.is_multicast:
            raise UsageError(f"--node_ips: {ip} is not the address of a machine")


def resolve(host: str) -> str:
    """The IPv4 address of an address or host name. Raises UsageError."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--node_ips: no IPv4 address is known for {host!r} ({why})") from None


def is_own_address(host: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((resolve(host), 0))
    except (OSError, UsageError):
        return False
    return True


def find_node_rank(
    node_ips: Sequence[str],
    node_rank: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Which node this machine is: as given, by its own addresses, or as the scheduler says.

    Raises UsageError where that cannot be told.
    """
    if node_rank is not None:
        return node_rank
    own = [i for i, host in enumerate(node_ips) if is_own_address(host)]
    if len(own) == 1:
        return own[0]
    listed = ",".join(node_ips)
    if own:
        raise UsageError(
            f"--node_ips={listed}: {' and '.join(node_ips[i] for i in own)} are both addresses of "
            "this machine; say with --node_rank which node this is"
        )
    for rank_name, size_name in SCHEDULERS:
        rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
        # A scheduler that counts something else than nodes does not know which node this is.
        if size == str(len(node_ips)) and rank.isdecimal() and int(rank) < len(node_ips):
            return int(rank)
    raise UsageError(
        f"--node_ips={listed}: none of them is an address of this machine; correct the list, or "
        "say with --node_rank which node this is"
    )


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
    """To be called before OneFlow is imported; does nothing in a process that is no worker.

    Waits until rank 0 listens: OneFlow tries once, and sleeps for 10 s before it tries again. And
    sees to it that an exception ends this process, see `leave`.
    """
    if not is_worker(environ):
        return
    sys.excepthook = die
    if worker_rank(environ) == 0:
        return
    address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    end = time.monotonic() + RANK_0_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection(address, timeout=BEAT_SECONDS).close()
            return
        except OSError:
            time.sleep(TICK_SECONDS)


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


# Ports.


def who_listens(port: int) -> str:
    """` by <program> (process <id>)` for a port in use on this machine, or nothing if unknown."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue
        listening = "0A"
        inodes |= {
            f"socket:[{row[9]}]"
            for row in rows
            if row[3] == listening and int(row[1].rpartition(":")[2], 16) == port
        }
    for process in filter(str.isdecimal, os.listdir("/proc") if inodes else ()):
        try:
            files = os.listdir(f"/proc/{process}/fd")
            if any(os.readlink(f"/proc/{process}/fd/{fd}") in inodes for fd in files):
                with open(f"/proc/{process}/comm", encoding="utf-8") as file:
                    return f" by {file.read().strip()} (process {process})"
        except OSError:  # it has ended, or belongs to another user
            continue
    return ""


def listen(job: Job) -> socket.socket:
    """The socket at which node 0 waits for the others. Raises RunError for a port in use."""
    host = job.node_ips[0]
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:  # on its own machine a host name may stand for 127.0.1.1
        address = ""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a job may just have ended here
    try:
        try:
            sock.bind((address if is_own_address(address) else "", job.ctrl_port))
            sock.listen(MAX_STRANGERS)
        except OSError as error:
            raise RunError(
                f"{job.node(0)} cannot listen on port {job.ctrl_port}: {error.strerror}"
                f"{who_listens(job.ctrl_port)}; end that, or give every node another --ctrl_port"
            ) from None
    except RunError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def reserve_port(preferred: int | None) -> socket.socket:
    """A socket bound to a TCP port that nobody uses: `preferred` if possible, else any.

    It is bound without SO_REUSEPORT, to see that the port is free, and gets that option afterwards,
    so that OneFlow's server, which sets it, can take the port, and nobody else until then.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind(("", preferred if preferred and preferred <= 65535 else 0))
    except OSError:
        sock.bind(("", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


# Messages between parents.


class Gone(Exception):
    """The other side of a channel closed it, or said something that is no message."""


class Channel:
    """A connection to another parent: JSON objects, each after its length in 4 bytes."""

    def __init__(self, sock: socket.socket, address: str):
        sock.setblocking(False)  # a send must never wait for a peer that does not read
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.address = sock, address
        self.node: int | None = None  # until it has said so
        self.told = False  # how the job ends; nothing more goes there
        self.opened = self.heard = self.sent = time.monotonic()
        self.inbox, self.outbox = bytearray(), bytearray()

    def send(self, kind: str, **fields) -> None:
        data = json.dumps({"kind": kind, **fields}).encode()
        assert len(data) <= MAX_MESSAGE_BYTES, f"a message of {len(data)} bytes"
        self.outbox += len(data).to_bytes(4, "big") + data
        self.sent = time.monotonic()
        self.flush()

    def flush(self) -> None:
        try:
            while self.outbox:
                del self.outbox[: self.sock.send(self.outbox)]
        except BlockingIOError:
            pass
        except OSError:  # reading will tell
            self.outbox.clear()

    def receive(self) -> list[dict]:
        """The messages that have arrived. Raises Gone."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone(error.strerror) from None
        if not data:
            raise Gone("closed")
        self.heard = time.monotonic()
        self.inbox += data
        messages = []
        while len(self.inbox) >= 4:
            size = int.from_bytes(self.inbox[:4], "big")
            if size > MAX_MESSAGE_BYTES:
                raise Gone("not a message")
            if len(self.inbox) < 4 + size:
                break
            try:
                message = json.loads(self.inbox[4 : 4 + size])
            except (ValueError, RecursionError):
                raise Gone("not a message") from None
            if not isinstance(message, dict):
                raise Gone("not a message")
            messages.append(message)
            del self.inbox[: 4 + size]
        return messages


def difference(ours: object, theirs: object, name: str = "") -> tuple[str, object, object] | None:
    """The first fact in which two nodes differ, with both values; nested names are joined."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            path = f"{name} {key}".strip()
            found = difference(ours.get(key, "nothing"), theirs.get(key, "nothing"), path)
            if found is not None:
                return found
        return None
    # As text: in JSON, not a number equals itself.
    return None if json.dumps(ours) == json.dumps(theirs) else (name, ours, theirs)


def brief(value: object, limit: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


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
            self.process.wait(REAP_SECONDS)
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


@dataclass(frozen=True)
class Cause:
    """Something that ends the job. The lowest order explains it best, then the first one."""

    order: int
    text: str
    status: int = 1
    tail: tuple[str, ...] = ()


OWN_WORDS, DEATH, ABORT = range(3)  # OneFlow aborts when another process dies: it is the effect


def cause_of(job: Job, ended: Exit) -> Cause:
    if job.world_size == 1:
        if ended.code > 0:
            text = ended.own_error if ended.is_explained else ""  # else it has said so itself
            return Cause(OWN_WORDS, text, ended.code)
        return Cause(DEATH, ended.describe("the process"), tail=ended.tail)
    text = f"{ended.describe(job.rank(ended.rank))}; all processes were ended"
    if ended.code > 0 and ended.own_error:
        return Cause(OWN_WORDS, text, 2 if ended.code == 2 else 1)
    explained = ended.code == -signal.SIGKILL
    return Cause(
        ABORT if ended.is_abort else DEATH,
        text,
        2 if ended.code == 2 else 1,
        () if explained else ended.tail,
    )


def loss(node: str, why: str, *, silent: bool) -> str:
    if silent:
        return f"{node} was {why} (is the machine or the network down?)"
    return f"the launching process of {node} is gone ({why})"


@dataclass(frozen=True)
class End:
    """How this parent ends, with the line it prints."""

    status: int
    text: str = ""
    at_once: bool = False  # SIGKILL without SIGTERM
    stay: bool = False  # node 0: wait for those that have not come, to tell them
    tail: tuple[str, ...] = ()  # of the worker that is the cause


# Parents.


Explain = Callable[[int, Sequence[str]], str | None]  # number on this node, last words


class Parent:
    """What the parents of all nodes have in common: workers, signals, and one loop for everything.

    Subclasses say what to do about messages, exits and signals, and set `end` when it is time.
    """

    def __init__(self, command: Sequence[str], job: Job, explain: Explain, stdin: int | None):
        self.command, self.job, self.explain, self.stdin = command, job, explain, stdin
        self.selector = selectors.DefaultSelector()
        self.channels: list[Channel] = []
        self.workers: list[Worker] = []
        self.guard: Guard | None = None
        self.running: set[int] = set()  # ranks of this node
        self.end: End | None = None
        self.said = False  # a parent prints one line
        self.signals: list[tuple[float, int]] = []
        self.first_signal = 0.0  # when it came
        self.stop_signal: int | None = None

    # What subclasses add.

    def hears(self, channel: Channel, message: dict) -> None:
        raise NotImplementedError

    def loses(self, channel: Channel, why: str, *, silent: bool = False) -> None:
        raise NotImplementedError

    def worker_ended(self, ended: Exit) -> None:
        raise NotImplementedError

    def signalled(self, number: int, *, again: bool) -> None:
        raise NotImplementedError

    def wakes(self) -> None:
        """Called in every turn, for what depends on time."""

    # The loop.

    def turn(self) -> None:
        """Wait for a moment and do what has come up."""
        for key, _ in self.selector.select(TICK_SECONDS):
            key.data()
        now = time.monotonic()
        for channel in list(self.channels):
            channel.flush()
            if channel.node is None or channel.told:
                continue
            if now - channel.heard > SILENCE_SECONDS:
                self.read(channel)  # perhaps it was this process that stood still
                if channel in self.channels and now - channel.heard > SILENCE_SECONDS:
                    self.drop(channel)
                    self.loses(channel, f"not heard of for {SILENCE_SECONDS:g} s", silent=True)
            elif now - channel.sent >= BEAT_SECONDS:
                channel.send("beat")
        self.poll_workers()
        self.take_signals()
        self.wakes()

    def add(self, channel: Channel) -> None:
        self.channels.append(channel)
        self.selector.register(channel.sock, selectors.EVENT_READ, lambda: self.read(channel))

    def drop(self, channel: Channel) -> None:
        if channel in self.channels:
            self.channels.remove(channel)
            self.selector.unregister(channel.sock)
            channel.sock.close()

    def read(self, channel: Channel) -> None:
        try:
            for message in channel.receive():
                self.hears(channel, message)
        except Gone as gone:
            self.drop(channel)
            self.loses(channel, str(gone))
        except (LookupError, TypeError, ValueError, ArithmeticError):  # JSON, but none of ours
            self.drop(channel)
            self.loses(channel, "not a message")

    def take_signals(self) -> None:
        while self.signals:
            when, number = self.signals.pop(0)
            if not self.first_signal:
                self.first_signal = when
                self.signalled(number, again=False)
            elif when - self.first_signal > SAME_SIGNAL_SECONDS:
                self.signalled(number, again=True)

    # Workers.

    def start_workers(self, master: tuple[str, int]) -> None:
        sys.stdout.flush()  # rank 0 writes there as well
        self.guard = Guard()
        for rank in self.job.ranks:
            worker = Worker(
                self.command,
                worker_environ(self.job, rank, master),
                rank,
                alone=self.job.world_size == 1,
                stdin=self.stdin,
            )
            self.guard.toggle(worker.pid)
            self.workers.append(worker)
            self.running.add(rank)
            self.selector.register(
                worker.process.stderr,
                selectors.EVENT_READ,
                lambda worker=worker: self.read_worker(worker),
            )

    def read_worker(self, worker: Worker) -> None:
        if not worker.read_stderr():
            self.selector.unregister(worker.process.stderr)

    def poll_workers(self) -> None:
        for worker in self.workers:
            if worker.held and worker.rank in self.running and self.calm(worker):
                worker.release()
            worker.pass_on()
            if worker.rank in self.running and (code := worker.poll()) is not None:
                self.running.discard(worker.rank)
                self.guard.toggle(worker.pid)
                self.worker_ended(self.describe_exit(worker, code))

    def describe_exit(self, worker: Worker, code: int) -> Exit:
        words = () if code == 0 else worker.last_words()
        known = self.explain(worker.rank - self.job.ranks[0], words) if words else None
        if known is not None:
            return Exit(worker.rank, 1, known, is_explained=True)
        return Exit(worker.rank, code, worker.own_error, worker.fatal, words)

    def calm(self, worker: Worker) -> bool:
        """Whether no crash has followed the lines that were held back."""
        waited = time.monotonic() - worker.held_since > HOLD_SECONDS
        return waited and not worker.holding and self.end is None and self.stop_signal is None

    def pass_signal(self, number: int) -> None:
        """Hand a signal to the workers, once: they finish together by themselves."""
        if self.stop_signal is None:
            self.stop_signal = number
            for worker in self.workers:
                if worker.rank in self.running:
                    os.kill(worker.pid, number)

    def end_workers(self) -> None:
        """End what still runs: SIGTERM, and SIGKILL a moment later."""
        for worker in self.workers:  # what it says of being ended must not stand before why
            worker.shown = False
        kill_at = time.monotonic()
        if not self.end.at_once:
            kill_at += TERM_SECONDS
            self.signal_workers(signal.SIGTERM)
        while self.running and time.monotonic() < kill_at + REAP_SECONDS:
            if time.monotonic() >= kill_at:
                self.signal_workers(signal.SIGKILL)
            self.turn()

    def signal_workers(self, number: int) -> None:
        for worker in self.workers:
            if worker.rank in self.running:
                signal_group(worker.pid, number)

    # The whole.

    def run(self) -> int:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would lose the exit statuses
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job
                handlers[number] = signal.signal(number, self.note_signal)
        try:
            self.begin()
            while self.end is None:
                self.turn()
            self.finish()
            self.say_end()
            return self.end.status
        finally:
            self.signal_workers(signal.SIGKILL)  # only after a fault of our own are there any
            if self.guard is not None:
                self.guard.close()
            self.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def note_signal(self, number: int, frame: object) -> None:
        self.signals.append((time.monotonic(), number))

    def begin(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for channel in list(self.channels):
            self.drop(channel)
        for worker in self.workers:
            worker.process.stderr.close()
        self.selector.close()

    def say_end(self) -> None:
        """Print the one line, and on node 0 what the worker that is the cause said last."""
        for worker in self.workers:
            if self.end.status in (0, 130, 143) or not self.end.text:
                worker.release(native=self.end.status not in (130, 143))
            worker.pass_on(wait=True)
        if self.end.text and not self.said:
            self.said = True
            config.report(self.end.text)
            if self.job.node_rank == 0:
                sys.stderr.writelines(f"    {line}\n" for line in self.end.tail)


class Head(Parent):
    """The parent of node 0, which decides. It is alone where there is only one node."""

    def __init__(self, facts: dict | None, error: End | None, **parent):
        super().__init__(**parent)
        self.facts, self.error = facts, error
        self.listener: socket.socket | None = None
        self.port: socket.socket | None = None
        self.deadline = time.monotonic() + self.job.start_timeout
        self.nodes: dict[int, Channel] = {}  # that have come and fit
        self.num_met = 0  # that have come at all
        self.started = False
        self.working = set(range(self.job.world_size))
        self.stopped = False  # a worker has ended as a signal asked it to
        self.stop_deadline = 0.0
        self.causes: list[Cause] = []
        self.decide_at = 0.0

    def begin(self) -> None:
        if self.job.num_nodes > 1:
            try:
                self.listener = listen(self.job)
            except RunError as error:
                self.end = self.error or End(error.exit_status, str(error))
                return
            self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.end = self.error
        self.start_if_complete()

    def accept(self) -> None:
        try:
            sock, (address, _) = self.listener.accept()
        except OSError:  # gone again
            return
        if sum(channel.node is None for channel in self.channels) >= MAX_STRANGERS:
            sock.close()
        else:
            self.add(Channel(sock, address))

    def hears(self, channel: Channel, message: dict) -> None:
        kind = message["kind"]
        if channel.node is None:
            self.greet(channel, message)
        elif kind == "exited":
            self.worker_ended(Exit(**message["exit"] | {"tail": tuple(message["exit"]["tail"])}))
        elif kind == "signal":
            self.stop(int(message["number"]), channel.node, again=bool(message["at_once"]))
        elif kind == "ended":
            self.drop(channel)
            self.loses(channel, "it ended first")

    def greet(self, channel: Channel, message: dict) -> None:
        """Take a node in, or say why not. Who does not speak like one is dropped."""
        if message.get("magic") != MAGIC:
            raise Gone("a stranger")
        channel.send("welcome", magic=MAGIC)
        if message.get("protocol") != PROTOCOL:
            text = f"{channel.address} runs another version of this toolkit; it has to be the same"
            self.settle(End(2, text, stay=True))
            return self.tell(channel)
        self.num_met += 1
        node = int(message["node_rank"])
        if self.started:
            text = f"a job is already running on {self.job.node(0)}, port {self.job.ctrl_port}"
            return self.tell(channel, End(1, text))
        flags = difference(self.job.flags, message["flags"])
        if flags is not None:
            self.settle(self.differ(flags, f"the node at {channel.address}"))
        elif not 0 < node < self.job.num_nodes or node in self.nodes:
            other = self.nodes[node].address if node in self.nodes else "this one"
            self.settle(
                End(
                    2,
                    f"two nodes say that they are node {node}: {other} and {channel.address}; give "
                    "each its own --node_rank",
                    stay=True,
                )
            )
        else:
            channel.node = node
            self.nodes[node] = channel
            if message["error"] is not None:
                status, text = message["error"]
                self.settle(End(int(status), str(text), stay=True))
            elif self.facts is not None:
                facts = difference(self.facts, message["facts"])
                if facts is not None:
                    self.settle(self.differ(facts, self.job.node(node)))
        if self.end is not None:
            return self.tell(channel)
        self.start_if_complete()

    def differ(self, found: tuple[str, object, object], where: str) -> End:
        name, ours, theirs = found
        return End(
            2,
            f"{name} differs: {brief(ours)} on {self.job.node(0)}, {brief(theirs)} on {where}; "
            "every node needs the same command, data and versions",
            stay=True,
        )

    def settle(self, end: End) -> None:
        """The first reason is the one."""
        if self.end is None:
            self.end = end

    def tell(self, channel: Channel, end: End | None = None) -> None:
        """Tell one node how it ends."""
        end = end or self.end
        channel.send("end", status=end.status, text=end.text, at_once=end.at_once)
        channel.told = True

    def find_shared_address(self, own: str) -> End | None:
        """How the job ends where two nodes on CUDA have one address.

        OneFlow tells machines apart by their addresses, and would wait for ever for the devices of
        a machine that it takes for part of another.
        """
        if self.facts.get("device") != "cuda":
            return None
        seen = {own: 0}
        for node, channel in sorted(self.nodes.items()):
            if channel.address in seen:
                first = self.job.node(seen[channel.address])
                text = (
                    f"{first} and {self.job.node(node)} both have the address {channel.address}, "
                    "so they are one machine to OneFlow; give its devices to one node with "
                    "--gpu_num_per_node, or each node an address of its own"
                )
                return End(2, text)
            seen[channel.address] = node
        return None

    def start_if_complete(self) -> None:
        if self.end is not None or len(self.nodes) < self.job.num_nodes - 1:
            return
        if self.job.num_nodes == 1:
            self.port = reserve_port(None)
            address = "127.0.0.1"
        else:
            # Known in advance, for the sake of firewalls; and the address by which others came.
            self.port = reserve_port(self.job.ctrl_port + 1)
            address = self.nodes[1].sock.getsockname()[0]
            shared = self.find_shared_address(address)
            if shared is not None:
                self.settle(shared)
                for channel in self.nodes.values():
                    self.tell(channel)
                return
        master = (address, self.port.getsockname()[1])
        for channel in self.nodes.values():
            channel.send("start", master=master)
        self.started = True
        self.start_workers(master)

    def loses(self, channel: Channel, why: str, *, silent: bool = False) -> None:
        node = channel.node
        if node is None or self.nodes.get(node) is not channel or self.end is not None:
            return
        if not self.started:  # it may come again
            del self.nodes[node]
            return
        text = loss(self.job.node(node), why, silent=silent)
        self.fail(Cause(DEATH, f"{text}; all processes were ended"), wait=not silent)

    def worker_ended(self, ended: Exit) -> None:
        self.working.discard(ended.rank)
        if self.end is not None:
            return
        stop = {130: signal.SIGINT, 143: signal.SIGTERM}.get(ended.code)
        if stop is not None or self.stop_signal is not None and ended.code == -self.stop_signal:
            self.stopped = True
            self.stop_deadline = self.stop_deadline or time.monotonic() + STOP_SECONDS
            self.stop_signal = self.stop_signal or stop  # somebody sent it to the workers
        elif ended.code != 0:
            self.fail(cause_of(self.job, ended))
        if not self.working:
            self.decide()

    def fail(self, cause: Cause, *, wait: bool = True) -> None:
        self.causes.append(cause)
        for worker in self.workers:
            worker.holding = True
        decide_at = time.monotonic() + (GATHER_SECONDS if wait else 0)
        self.decide_at = min(self.decide_at or decide_at, decide_at)

    def decide(self) -> None:
        """Say how the job ends, from what has come in."""
        causes = self.causes
        if self.stopped:  # processes that are left alone abort
            causes = [cause for cause in causes if cause.order != ABORT]
            if self.working and not causes:  # perhaps rank 0 is still saving
                limit = time.monotonic() + SILENCE_SECONDS
                self.stop_deadline, self.decide_at = min(self.stop_deadline, limit), 0
                return
        if causes:
            cause = min(causes, key=lambda cause: cause.order)  # the first of the best
            self.settle(End(cause.status, cause.text, tail=cause.tail))
        else:
            self.settle(End(128 + self.stop_signal if self.stopped else 0))

    def signalled(self, number: int, *, again: bool) -> None:
        self.stop(number, 0, again=again)

    def stop(self, number: int, node: int, *, again: bool) -> None:
        name = signal.Signals(number).name
        if self.end is not None:
            if not self.started:  # it only stayed to tell others
                self.deadline = 0
        elif again or not self.started:
            at = f" on {self.job.node(node)}"
            text = f"ended at once by {name}{at}" if self.started else f"interrupted{at}"
            self.end = End(128 + number, text, at_once=True)
        else:
            self.pass_signal(number)
            self.stop_deadline = self.stop_deadline or time.monotonic() + STOP_SECONDS
            for channel in self.nodes.values():
                channel.send("signal", number=number)

    def wakes(self) -> None:
        now = time.monotonic()
        for channel in list(self.channels):
            if channel.node is None and now - channel.opened > HELLO_SECONDS:
                self.drop(channel)
        if self.end is not None:
            return
        if not self.started and now > self.deadline:
            missing = [n for n in range(1, self.job.num_nodes) if n not in self.nodes]
            self.end = End(
                1,
                f"{', '.join(map(self.job.node, missing))} did not come to {self.job.node_ips[0]} "
                f"port {self.job.ctrl_port} within {self.job.start_timeout:g} s; run the same "
                "command on every node",
            )
        elif self.decide_at and now >= self.decide_at:
            self.decide()
        elif self.stop_deadline and now > self.stop_deadline:
            name = signal.Signals(self.stop_signal).name
            text = f"some processes did not end after {name}; they were killed"
            self.end = End(128 + self.stop_signal, text, at_once=True)

    def finish(self) -> None:
        """Tell every node, end the workers, and leave when the others have ended theirs."""
        for channel in self.nodes.values():
            if channel in self.channels and not channel.told:
                self.tell(channel)
        if not self.started:
            self.say_end()
            self.deadline = time.monotonic() + min(TELL_SECONDS, self.job.start_timeout)
            missing = self.job.num_nodes - 1 if self.end.stay and self.listener else 0
            while self.num_met < missing and time.monotonic() < self.deadline:
                self.turn()
        self.end_workers()
        deadline = time.monotonic() + TERM_SECONDS + REAP_SECONDS
        while any(channel.told for channel in self.channels) and time.monotonic() < deadline:
            self.turn()

    def close(self) -> None:
        super().close()
        for sock in (self.listener, self.port):
            if sock is not None:
                sock.close()


class Follower(Parent):
    """The parent of any other node, which does as node 0 says for as long as it hears from it."""

    def __init__(self, facts: dict | None, error: End | None, **parent):
        super().__init__(**parent)
        self.facts, self.error = facts, error
        self.channel: Channel | None = None
        self.welcomed = False
        self.refused = ""

    def begin(self) -> None:
        """Come to node 0, trying until the time is up."""
        if self.error is not None:  # here and now, in case nobody can be told
            config.report(self.error.text)
            self.said = True
        try:
            address = (resolve(self.job.node_ips[0]), self.job.ctrl_port)
        except UsageError as error:
            self.end = End(error.exit_status, f"{self.job.node(self.job.node_rank)}: {error}")
            return
        deadline = time.monotonic() + self.job.start_timeout
        while self.end is None and not self.welcomed:
            self.refused = ""
            try:
                self.greet(
                    Channel(socket.create_connection(address, timeout=BEAT_SECONDS), address[0])
                )
            except OSError as error:
                self.refused = error.strerror or str(error)
                time.sleep(TICK_SECONDS)
            self.take_signals()
            if self.end is None and not self.welcomed and time.monotonic() > deadline:
                self.end = self.error or End(
                    1,
                    f"{self.job.node(0)} did not answer on port {self.job.ctrl_port} within "
                    f"{self.job.start_timeout:g} s ({self.refused}); run the same command there, "
                    "and let the port through its firewall",
                )

    def greet(self, channel: Channel) -> None:
        """Say who we are, and wait for an answer that only a parent gives."""
        self.channel = channel
        self.add(channel)
        channel.send(
            "hello",
            magic=MAGIC,
            protocol=PROTOCOL,
            node_rank=self.job.node_rank,
            flags=self.job.flags,
            facts=self.facts,
            error=None if self.error is None else (self.error.status, self.error.text),
        )
        deadline = time.monotonic() + HELLO_SECONDS
        while channel in self.channels and self.end is None and not self.welcomed:
            self.turn()
            if time.monotonic() > deadline:
                self.drop(channel)
                self.refused = "what listens there does not answer"

    def hears(self, channel: Channel, message: dict) -> None:
        kind = message["kind"]
        if not self.welcomed:
            if kind != "welcome" or message.get("magic") != MAGIC:
                raise Gone("something else listens there")
            self.welcomed, channel.node = True, 0
        elif kind == "start":
            address, port = message["master"]
            self.start_workers((str(address), int(port)))
        elif kind == "signal":
            self.pass_signal(int(message["number"]))
        elif kind == "end" and self.end is None:
            text, at_once = str(message["text"]), bool(message["at_once"])
            self.end = End(int(message["status"]), text, at_once=at_once)

    def loses(self, channel: Channel, why: str, *, silent: bool = False) -> None:
        if not self.welcomed:
            self.refused = why
            time.sleep(TICK_SECONDS)
        elif self.end is None:
            text = loss(self.job.node(0), why, silent=silent)
            self.end = End(1, f"{text}; all processes of this node were ended")

    def worker_ended(self, ended: Exit) -> None:
        if self.end is None:
            self.channel.send("exited", exit=vars(ended))

    def signalled(self, number: int, *, again: bool) -> None:
        node = self.job.node(self.job.node_rank)
        if self.welcomed:
            at_once = again or not self.workers
            self.channel.send("signal", number=number, at_once=at_once)
        if self.end is not None:
            return
        if again or not self.workers:
            name = signal.Signals(number).name
            text = f"ended at once by {name} on {node}" if self.workers else "interrupted"
            self.end = self.error or End(128 + number, text, at_once=True)
        else:
            self.pass_signal(number)

    def finish(self) -> None:
        self.end_workers()
        if self.channel in self.channels:
            self.channel.send("ended")
            # A close with something unread would take back what was just sent.
            deadline = time.monotonic() + REAP_SECONDS
            while self.channel in self.channels and time.monotonic() < deadline:
                self.channel.told = True
                self.turn()


def gather_facts(job: Job, facts: Callable[[], dict]) -> tuple[dict | None, End | None]:
    """What this node found, or why it cannot take part."""
    try:
        found = facts()
    except (UsageError, RunError) as error:
        text, status = str(error), error.exit_status
    except OSError as error:
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        status = 1
    else:
        return json.loads(json.dumps(found)), None  # as the others' arrive
    where = f"{job.node(job.node_rank)}: " if job.num_nodes > 1 else ""
    return None, End(status, where + text, stay=True)


def command(script: str, argv: list[str] | None) -> list[str]:
    """What starts a script once more, as a worker; `argv` as its `main` got it."""
    return [sys.executable, *(sys.argv if argv is None else [script, *argv])]


def launch(
    command: Sequence[str],
    *,
    job: Job,
    facts: Callable[[], dict],
    explain: Explain = lambda local_rank, words: None,
    stdin: int | None = subprocess.DEVNULL,
) -> int:
    """Run `command` once per device of the job and return the exit status of this parent.

    `facts` checks this machine and returns what has to be the same on every node, by name; values
    are anything JSON knows, and nested dicts are compared name by name. It may raise UsageError,
    RunError or OSError, which ends the job on every node. `explain` turns what a worker that has
    crashed wrote last into one line, where it knows better. `stdin` is that of every worker, as
    subprocess.Popen takes it. Has to be called in the main thread.

    0: every worker ended with 0. 1 or 2: the job failed, and one line on stderr says where and why.
    130 or 143: SIGINT or SIGTERM came to one of the parents.
    """
    # A process alone checks for itself.
    found, error = gather_facts(job, facts) if job.world_size > 1 else ({}, None)
    kind = Head if job.node_rank == 0 else Follower
    return kind(found, error, command=command, job=job, explain=explain, stdin=stdin).run()
