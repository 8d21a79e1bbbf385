"""The watcher of a rank that another launcher has started.

The rank finds out what has to be the same on all ranks and starts its watcher with it, a process
that needs no OneFlow. The watchers connect to that of rank 0 and agree as the parents of nodes do
(cnns.launch.parent), each a node with one process. When all have connected, the rank executes its
script anew with the variables that OneFlow reads, in the same process, so that the launcher's
signals and its view of the end are of the rank itself. The watcher reads the rank's stderr from
then on, and tells it when the job ends.

A process beside the rank, not a thread in it: OneFlow compiles a graph for many seconds without
letting Python's other threads run.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import NoReturn

from cnns.errors import RunError, UsageError, describe, report
from cnns.interrupts import SIGNALS, watched
from cnns.launch.channel import HELLO_SECONDS, MAGIC, Channel
from cnns.launch.control import CONTROL_MARK
from cnns.launch.external import NODES_MARK, Place, RankJob
from cnns.launch.job import reserve_port
from cnns.launch.parent import (
    CONNECT_SECONDS,
    REAP_SECONDS,
    TELL_SECONDS,
    TERM_SECONDS,
    Coordinator,
    Parent,
    coordinate,
    open_connection,
    settle,
    wait_until,
)
from cnns.launch.worker import NATIVE, End, Explain, Worker, signal_name, worker_environ

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PLACE_OF_CODE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from cnns.launch import watcher; watcher.main()"
)
LEAVE_SECONDS = 2.0  # rank 0 stays so long for the others to hear of the end


# In the rank, before it executes its script anew.


def launch_rank(
    command: Sequence[str],
    *,
    job: RankJob,
    facts: Callable[[], dict] = dict,
    known: str = "",
    error: UsageError | None = None,
) -> NoReturn:
    """Become the rank of `job`, by executing `command`, once all ranks agree; else leave.

    Args:
        facts: as of cnns.launch.parent.launch.
        known: what to say where the rank has run out of its device's memory.
        error: why this rank cannot start.
    """
    found, failed = None, describe(error) if error else None
    try:
        found = facts()
    except (UsageError, RunError, OSError) as failure:
        failed = describe(failure)
    control, theirs = socket.socketpair()
    reading, writing = os.pipe()
    spec = {
        "script": sys.argv[0],
        "job": asdict(job),
        "facts": found,
        "error": failed,
        "known": known,
        "rank_pid": os.getpid(),
        "control": theirs.fileno(),
        "stderr": reading,
    }
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", START, PLACE_OF_CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(theirs.fileno(), reading),
        start_new_session=True,
    )
    for number in watched():
        signal.signal(number, lambda number, _: control.sendall(bytes([number])))
    assert watcher.stdin is not None
    with watcher.stdin:
        watcher.stdin.write(json.dumps(spec).encode())
    theirs.close()
    os.close(reading)
    with control.makefile("rb", buffering=0) as lines:  # what follows is for the next program
        kind, _, rest = lines.readline().decode().partition(" ")
    if kind == "exit":
        sys.stdout.flush()
        os._exit(int(rest))
    if kind != "start":
        raise RunError("the process that watches this rank was killed; start the job again")
    environ = json.loads(rest) | {CONTROL_MARK: str(control.fileno())}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the script can note them again
    keep_open(control.fileno())
    os.dup2(writing, 2)
    if job.node_rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execve(command[0], list(command), environ)


def keep_open(number: int) -> None:
    """Let the next program have this file descriptor, and the standard ones, but nothing that
    OneFlow has opened.
    """
    for each in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one of the directory
            os.set_inheritable(each, each <= 2 or each == number)


# In the watcher.


class Rank:
    """The process of a rank, which is the watcher's parent, as Worker sees a child."""

    def __init__(self, pid: int, stderr: int, tell: Callable[[str], None]):
        self.pid, self.stderr = pid, os.fdopen(stderr, "rb", buffering=0)
        self.tell = tell
        self.num_sent = 0  # signals that it will tell of as if others had sent them
        self.returncode: int | None = None  # of a process that is gone

    def fatal_signal(self) -> int:
        """The signal that is ending the process; 0: not known, or it is gone already."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as file:
                return int(file.read().split()[-1]) & 0x7F  # its last field is as `waitpid` has it
        except (OSError, ValueError):
            return 0

    def send_signal(self, number: int) -> None:
        self.num_sent += 1
        self.tell(f"signal {int(number)}")

    def kill(self) -> None:
        if os.getppid() == self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class RankWorker(Worker):
    def signal_group(self, number: int) -> None:
        """Only SIGKILL is asked for, after a fault of the watcher."""
        self.process.kill()

    def outcome(self, code: int, explain: Explain) -> End:
        """What it means; the `code` of a rank that has not said that it ends is -SIGKILL."""
        if code != -signal.SIGKILL:
            return super().outcome(code, explain)
        words = self.last_words()
        if any(map(NATIVE.match, words)):
            return super().outcome(-signal.SIGABRT, explain)
        number, text = -self.process.returncode, "died without a word (killed, or out of memory?)"
        if number > 0:
            why = " (out of memory?)" if number == signal.SIGKILL else ""
            text = f"was killed by {signal_name(number)}{why}"
        return End(1, f"{self.job.name_rank(self.rank)} {text}; all processes were ended")


class RankCoordinator(Coordinator):
    job: RankJob

    def __init__(self, job: RankJob, facts: dict | None):
        super().__init__(job, facts)
        self.machines: dict[int, dict] = {}

    def admit(self, channel: Channel, message: dict) -> End | None:
        rank, machine = int(message["node_rank"]), message["machine"]
        if rank in self.nodes:
            hosts = f"{self.job.hosts[rank]} and on {machine['host']}"
            return End(
                2, f"two processes say that they are rank {rank}, on {hosts}; give each its own"
            )
        self.job.hosts[rank], self.machines[rank] = machine["host"], machine
        return super().admit(channel, message)

    def check_address(self, channel: Channel, node: int, device: str | None) -> End | None:
        return None  # it takes all ranks to know

    def start(self) -> None:
        addresses = defaultdict(list)
        # Ranks beside rank 0 may know it by another address than the rest does.
        outside = [
            channel
            for channel in self.nodes.values()
            if channel.address not in (channel.own_address, "")
            and not channel.address.startswith("127.")
        ]
        address = outside[0].own_address if outside else "127.0.0.1"
        for rank in sorted(self.nodes):
            channel = self.nodes[rank]
            addresses[channel.address if channel in outside else address].append(rank)
        each = self.job.num_nodes // len(addresses)
        for ranks in addresses.values():
            if problem := self.check_ranks(ranks, each):
                return settle(self.end, End(2, problem))
        self.reserved_port = reserve_port(self.job.master_port)
        master = address, self.reserved_port.getsockname()[1]
        self.tell_all("start", master=master, nodes=(len(addresses), each))

    def check_ranks(self, ranks: Sequence[int], each: int) -> str | None:
        """What is wrong with the ranks of one address, of which there should be `each`.

        OneFlow takes an address for a machine, and the n-th rank of it for the one of the device n.
        """
        first = self.job.name_node(ranks[0])
        if list(ranks) != list(range(ranks[0], ranks[0] + each)) or ranks[0] % each:
            return (
                f"the ranks beside {first} are {', '.join(map(str, ranks))}, and OneFlow needs as "
                "many on each machine, one after the other (srun --distribution=block, mpirun "
                "--map-by slot)"
            )
        for rank in ranks if (self.facts or {}).get("device") == "cuda" else ():
            devices = self.machines[rank]["devices"]
            if devices < each:
                return (
                    f"{self.job.name_node(rank)} may use {devices} CUDA devices, and {each} ranks "
                    "run there; start fewer, and let each use all devices of its machine (Slurm: "
                    "--gres=gpu:N, no --gpus-per-task)"
                )
        return None


class Watcher(Parent):
    """The parent of one rank, but that it neither starts it nor is its parent."""

    job: RankJob

    def __init__(self, job: RankJob, *, facts: Callable[[], dict], spec: dict):
        known = spec["known"]
        super().__init__(
            (),
            job=job,
            facts=facts,
            explain=lambda _, words: known if any("out of memory" in w for w in words) else None,
            stdin=None,
        )
        self.process = Rank(spec["rank_pid"], spec["stderr"], self.tell)
        self.control = socket.socket(fileno=spec["control"])
        self.control.setblocking(False)
        self.rest = b""  # of a line of the rank
        self.is_told = False  # why the job ends, by rank 0
        self.others: Callable[[], bool] = lambda: False  # whether some have not heard of the end
        self.loop.add_reader(self.control, self.read_control)

    def says_why(self) -> bool:
        """The others do where rank 0 cannot."""
        return self.job.node_rank == 0 or not self.is_told

    def on_message(self, channel: Channel, kind: str, fields: dict) -> None:
        if kind == "start":
            self.nodes = fields["nodes"]
        self.is_told = self.is_told or kind == "end"
        super().on_message(channel, kind, fields)

    def start_workers(self, master: tuple[str, int]) -> None:
        num_nodes, each = self.nodes
        rank = self.job.node_rank
        environ = worker_environ(self.job, rank, master)
        cores = len(os.sched_getaffinity(0))
        if cores == os.cpu_count():  # else the launcher has given each rank its own
            cores = max(1, cores // each)
        environ.setdefault("OMP_NUM_THREADS", str(cores))
        environ |= {"LOCAL_RANK": str(rank % each), NODES_MARK: f"{num_nodes}x{each}"}
        self.add_worker(RankWorker(self.process, job=self.job, rank=rank))
        self.tell(f"start {json.dumps(environ)}")

    def tell(self, line: str) -> None:
        with suppress(OSError):  # it is gone
            self.control.setblocking(True)
            self.control.sendall(f"{line}\n".encode())
            self.control.setblocking(False)

    def read_control(self) -> None:
        try:
            data = self.control.recv(1 << 12)
        except ConnectionError:
            data = b""
        for byte in data:
            if byte in SIGNALS and self.process.num_sent:
                self.process.num_sent -= 1
            elif byte in SIGNALS:
                self.on_signal(byte)
        text = bytes(byte for byte in data if byte == ord("\n") or byte >= ord(" "))
        *lines, self.rest = (self.rest + text).split(b"\n")
        for line in lines:
            self.end_rank(int(line.removeprefix(b"exit ")))
        if not data:
            self.loop.remove_reader(self.control)
            self.process.returncode = -self.process.fatal_signal()
            self.end_rank(-signal.SIGKILL)

    def end_rank(self, code: int) -> None:
        if self.running:
            self.on_exit(self.workers[0], code)
        elif not self.workers:
            rank = self.job.node_rank
            end = End(1, f"{self.job.name_rank(rank)} died before the start")
            if self.coordinator is not None:
                self.coordinator.send("exit", rank=rank, end=vars(end))
            settle(self.end, end)

    async def end_workers(self, end: End) -> None:
        """Say why, let the others know, and let the rank go: in a container all ends with it."""
        for worker in self.workers:
            worker.is_shown, worker.is_ending = False, True
        super().report(end)
        patient = not self.workers and not end.at_once
        await wait_until(lambda: not self.others(), TELL_SECONDS if patient else LEAVE_SECONDS)
        self.tell(f"exit {end.status}")
        await wait_until(lambda: self.process.returncode is not None, TERM_SECONDS)
        self.process.kill()
        await wait_until(lambda: self.process.returncode is not None, REAP_SECONDS)

    def report(self, end: End) -> None:
        """It was said before the rank was let go."""

    def cannot_listen(self, error: RunError) -> None:
        report(error)
        self.tell("exit 1")


def main() -> None:
    spec = json.load(sys.stdin)
    sys.argv[0] = spec["script"]
    # Slurm signals every process of a job, and the rank tells of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    asyncio.run(watch(spec))


async def watch(spec: dict) -> None:
    place = Place(**spec["job"].pop("place"))
    job = RankJob(**spec["job"] | {"place": place, "hosts": {place.rank: place.host}})

    def facts() -> dict:
        if spec["error"] is None:
            return spec["facts"]
        status, text = spec["error"]
        raise UsageError(text) if status == 2 else RunError(text)

    async def connect() -> Streams:
        try:
            return await open_connection(place.address, job.ctrl_port, family=socket.AF_INET)
        except socket.gaierror:
            raise OSError(f"no IPv4 address is known for {place.address!r}") from None

    watcher = Watcher(job, facts=facts, spec=spec)
    try:
        if place.rank > 0:
            await watcher.run(connect)
            return
        coordinator = RankCoordinator(job, watcher.facts)
        watcher.others = lambda: (
            sum(channel.greeted for channel in coordinator.channels) > 1
            or (not coordinator.has_started and coordinator.num_met < job.num_nodes)
        )
        await coordinate(watcher, coordinator)
    except RunError as error:  # a port in use
        if await is_coordinator(connect):  # which says what is wrong with a second rank 0
            await watcher.run(connect)
        else:
            watcher.cannot_listen(error)


async def is_coordinator(connect: Callable[[], Awaitable[Streams]]) -> bool:
    """Whether what listens says what a coordinator says first."""
    try:
        reader, writer = await asyncio.wait_for(connect(), CONNECT_SECONDS)
        line = await asyncio.wait_for(reader.readline(), HELLO_SECONDS)
        writer.close()
        return json.loads(line)["magic"] == MAGIC
    except (OSError, asyncio.TimeoutError, LookupError, TypeError, ValueError):
        return False
