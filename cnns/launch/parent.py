"""Start one process per device here, join the other nodes, watch them, end them all together.

One parent runs on each node, started by the same command. The parent of node 0 has a coordinator
as well, which listens on --ctrl_port. All parents connect to it and say what they found on their
machine; that of node 0 does so within its own process. When all have connected and agree, each
starts its workers: the same script once more, with the environment variables from which OneFlow
learns its rank. From then on both sides of each connection send heartbeats.

The coordinator decides when and how a job ends and tells all parents. A parent that has lost it
ends by itself. Nothing here needs OneFlow.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from cnns.errors import RunError, UsageError, describe, report
from cnns.interrupts import SIGNALS, STATUSES, is_ignored
from cnns.launch.channel import MAX_BYTES, PROTOCOL, Channel, brief, difference
from cnns.launch.job import Job, listen, reserve_port
from cnns.launch.terminal import share_terminal, terminal_environ
from cnns.launch.worker import END_BY_ABORT, STARTER, End, Explain, Worker, worker_environ

TICK_SECONDS = 0.1
CONNECT_SECONDS = 1.0  # for one attempt
TELL_SECONDS = 10.0  # node 0 stays so long to tell nodes that connect late why it ended
# After a death, for others that turn out to have died first, or for a better reason.
GATHER_SECONDS = 1.5
TERM_SECONDS = 1.5  # between SIGTERM and SIGKILL
REAP_SECONDS = 5.0  # for processes to be gone after SIGKILL
STOP_SECONDS = 300.0  # for workers to finish after a signal; saving takes a while
STOP_LEFT_SECONDS = 10.0  # for the others when one of them has died
SAME_SIGNAL_SECONDS = 1.0  # `timeout` and schedulers send a signal to the process and to its group

open_connection = partial(asyncio.open_connection, limit=MAX_BYTES)


def settle(future: asyncio.Future, end: End) -> None:
    """The first reason to end is the one that counts."""
    if not future.done():
        future.set_result(end)


async def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(TICK_SECONDS)


def describe_lost(job: Job, node: int, channel: Channel, why: str) -> str:
    if channel.is_silent:
        return f"{job.name_node(node)} was {why} (is the machine or the network down?)"
    return f"{job.name_parent(node)} is gone ({why})"


class Coordinator:
    """Decides when a job starts, and when and how it ends. All nodes are alike to it."""

    def __init__(self, job: Job, facts: dict | None):
        self.job, self.facts = job, facts
        self.loop = asyncio.get_running_loop()
        self.channels: set[Channel] = set()
        self.nodes: dict[int, Channel] = {}  # that take part
        self.num_met = 0  # nodes that have connected, whether they take part or not
        self.reserved_port: socket.socket | None = None  # of rank 0, from the start on
        self.working = set(range(job.world_size))
        self.causes: list[End] = []
        self.stop_signal = 0  # 0: none has come
        self.stopped = False  # a worker has ended as a signal asked it to
        self.end: asyncio.Future[End] = self.loop.create_future()

    @property
    def has_started(self) -> bool:
        """Whether all nodes take part, and their workers were told to start."""
        return self.reserved_port is not None

    async def run(self, listener: socket.socket | None) -> None:
        """Returns when the job has ended on all nodes, as far as they can be told."""
        if listener is not None:
            await asyncio.start_server(self.serve, sock=listener, limit=MAX_BYTES)
        self.loop.call_later(self.job.start_timeout, self.give_up_start)
        end = await self.end
        for channel in self.channels:
            channel.send("end", **vars(end))
        if not self.has_started and not end.at_once:
            seconds = min(TELL_SECONDS, self.job.start_timeout)
            await wait_until(lambda: self.num_met >= self.job.num_nodes, seconds)
        seconds = TERM_SECONDS + REAP_SECONDS
        await wait_until(lambda: not any(c.greeted for c in self.channels), seconds)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        self.channels.add(channel)
        why = await channel.run(self)
        self.channels.discard(channel)
        if channel.node is None or self.end.done():
            return
        if not self.has_started:  # it may connect again
            del self.nodes[channel.node]
            return
        text = describe_lost(self.job, channel.node, channel, why)
        self.fail(End(1, f"{text}; all processes were ended"), wait=not channel.is_silent)

    def tell_all(self, kind: str, **fields: Any) -> None:
        for channel in self.nodes.values():
            channel.send(kind, **fields)

    # Before the start.

    def on_hello(self, channel: Channel, message: dict) -> None:
        self.num_met += 1
        if self.has_started:
            text = f"a job is already running on {self.job.name_node(0)}, port {self.job.ctrl_port}"
            channel.send("end", **vars(End(1, text)))
            return
        if problem := self.admit(channel, message):
            settle(self.end, problem)
        if self.end.done():
            channel.send("end", **vars(self.end.result()))
        elif len(self.nodes) == self.job.num_nodes:
            self.start()

    def admit(self, channel: Channel, message: dict) -> End | None:
        """Let a node take part, or return why the job cannot start with it."""
        if message["protocol"] != PROTOCOL:
            text = f"{channel.address} runs another version of this toolkit; it has to be the same"
            return End(2, text)
        if found := difference(self.job.flags, message["flags"]):
            return self.differ(found, f"the node at {channel.address}")
        node = int(message["node_rank"])
        if not 0 <= node < self.job.num_nodes or node in self.nodes:
            other = node in self.nodes and self.nodes[node].address or "this one"
            return End(
                2,
                f"two nodes say that they are node {node}: {other} and {channel.address}; give "
                "each its own --node_rank",
            )
        channel.node, self.nodes[node] = node, channel
        if message["error"] is not None:
            return End(**message["error"])
        if self.facts is not None and (found := difference(self.facts, message["facts"])):
            return self.differ(found, self.job.name_node(node))
        return self.check_address(channel, node, message["facts"].get("device"))

    def check_address(self, channel: Channel, node: int, device: str | None) -> End | None:
        # OneFlow tells machines apart by their addresses, and would wait for ever for the devices
        # of a machine that it takes for part of another.
        addresses = {c.address: n for n, c in self.nodes.items() if 0 < n != node}
        first = ({channel.own_address: 0} | addresses).get(channel.address)
        if node > 0 and first is not None and device == "cuda":
            return End(
                2,
                f"{self.job.name_node(first)} and {self.job.name_node(node)} both have the address "
                f"{channel.address}, so they are one machine to OneFlow; give its devices to one "
                "node with --gpu_num_per_node, or each node an address of its own",
            )
        return None

    def differ(self, found: tuple[str, object, object], where: str) -> End:
        name, ours, theirs = found
        return End(
            2,
            f"{name} differs: {brief(ours)} on {self.job.name_node(0)}, {brief(theirs)} on "
            f"{where}; every node needs the same command, data and versions",
        )

    def start(self) -> None:
        address, port = "127.0.0.1", None
        if self.job.num_nodes > 1:
            # The address by which others have connected, and a port known in advance, for the sake
            # of firewalls.
            address, port = self.nodes[1].own_address, self.job.master_port
        self.reserved_port = reserve_port(port)
        self.tell_all("start", master=(address, self.reserved_port.getsockname()[1]))

    def give_up_start(self) -> None:
        missing = [self.job.name_node(n) for n in range(self.job.num_nodes) if n not in self.nodes]
        if missing:
            text = (
                f"{', '.join(missing)} did not connect to {self.job.node_ips[0]} port "
                f"{self.job.ctrl_port} within {self.job.start_timeout:g} s; run the same command "
                "on every node"
            )
            settle(self.end, End(1, text, at_once=True))

    # While it runs.

    def on_message(self, channel: Channel, kind: str, fields: dict) -> None:
        if channel.node is None or self.end.done():
            return
        if kind == "exit":
            self.on_exit(fields["rank"], End(**fields["end"]))
        elif kind == "signal":
            self.on_signal(fields["number"], channel.node, again=fields["again"])

    def on_exit(self, rank: int, end: End) -> None:
        self.working.discard(rank)
        if end.status in STATUSES:
            self.stopped = True
            self.expect_stop(end.status - 128, STOP_SECONDS)  # perhaps somebody else sent it
        elif end.status != 0:
            self.fail(end)
        if not self.working:
            self.decide()

    def fail(self, cause: End, *, wait: bool = True) -> None:
        self.causes.append(cause)
        self.tell_all("hold")
        self.loop.call_later(GATHER_SECONDS if wait else 0, self.decide)

    def decide(self) -> None:
        """Say how the job ends, from what is known."""
        causes = self.causes
        if self.stopped:  # processes that are left alone abort
            causes = [cause for cause in causes if cause.by != END_BY_ABORT]
            if self.working and not causes:  # perhaps rank 0 is still saving
                return self.expect_stop(self.stop_signal, STOP_LEFT_SECONDS)
        status = 128 + self.stop_signal if self.stopped else 0
        settle(self.end, min(causes, key=lambda cause: cause.by, default=End(status)))

    def on_signal(self, number: int, node: int, *, again: bool) -> None:
        at = f" on {self.job.name_node(node)}"
        if not self.has_started:
            settle(self.end, End(128 + number, f"interrupted{at}", at_once=True))
        elif again:
            text = f"ended at once by {signal.Signals(number).name}{at}"
            settle(self.end, End(128 + number, text, at_once=True))
        else:
            self.tell_all("signal", number=number)
            self.expect_stop(number, STOP_SECONDS)

    def expect_stop(self, number: int, seconds: float) -> None:
        self.stop_signal = self.stop_signal or number
        self.loop.call_later(seconds, self.give_up_stop)

    def give_up_stop(self) -> None:
        name = signal.Signals(self.stop_signal).name
        text = f"some processes did not end after {name}; they were killed"
        settle(self.end, End(128 + self.stop_signal, text, at_once=True))


class Parent:
    """Runs the workers of one node, and obeys the coordinator for as long as it is connected."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        job: Job,
        facts: Callable[[], dict],
        explain: Explain,
        stdin: int | None,
    ):
        self.command, self.job, self.explain, self.stdin = command, job, explain, stdin
        self.facts: dict | None = {}
        self.error: End | None = None
        try:
            if job.world_size > 1:  # a process alone checks for itself
                self.facts = json.loads(json.dumps(facts()))  # as the others' arrive
        except (UsageError, RunError, OSError) as error:
            status, text = describe(error)
            where = f"{job.name_node(job.node_rank)}: " if job.num_nodes > 1 else ""
            self.facts, self.error = None, End(status, where + text)
        self.loop = asyncio.get_running_loop()
        self.coordinator: Channel | None = None  # once it has answered
        self.refused = "no answer"  # why there is no connection yet
        self.workers: list[Worker] = []
        self.running: set[int] = set()  # ranks of this node
        self.stop_signal: int | None = None  # that the workers got
        self.first_signal_at: float | None = None
        self.end: asyncio.Future[End] = self.loop.create_future()

    async def run(self, connect: Callable) -> int:
        """Returns the exit status. `connect` makes the streams of a connection to node 0."""
        self.loop.set_exception_handler(self.on_fault)
        self.loop.add_signal_handler(signal.SIGCHLD, self.poll_workers)
        for number in SIGNALS:
            if not is_ignored(number):  # by nohup, or as a background job
                self.loop.add_signal_handler(number, self.on_signal, number)
        self.loop.call_later(self.job.start_timeout, self.give_up_connecting)
        if self.error is not None and not self.says_why():  # in case nobody can be told
            report(self.error.text)
        connection = asyncio.create_task(self.stay_connected(connect))
        try:
            end = await self.end
            await self.end_workers(end)
            self.report(end)
            if self.coordinator is not None and not self.coordinator.writer.is_closing():
                # The coordinator closes when it has read all that this node has sent.
                self.coordinator.writer.write_eof()
                await asyncio.wait([connection], timeout=REAP_SECONDS)
            return end.status
        finally:
            self.signal_workers(signal.SIGKILL)  # only after a fault of our own are there any

    def on_fault(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        if not self.end.done():
            self.end.set_exception(context.get("exception") or RuntimeError(context["message"]))

    async def stay_connected(self, connect: Callable) -> None:
        hello: dict[str, Any] = {
            "node_rank": self.job.node_rank,
            "machine": self.job.machine,
            "flags": self.job.flags,
            "facts": self.facts,
        }
        hello["error"] = None if self.error is None else vars(self.error)
        while self.coordinator is None:
            try:
                streams = await asyncio.wait_for(connect(), CONNECT_SECONDS)
            except asyncio.TimeoutError:
                self.refused = "timed out"
            except OSError as error:
                number = error.errno or 0  # below 0: a name is not known
                self.refused = os.strerror(number) if number > 0 else error.strerror or str(error)
            else:
                channel = Channel(*streams, **hello)
                self.refused = await channel.run(self)
                if channel.is_silent and self.coordinator is None:
                    self.refused = "what listens there does not answer"
            await asyncio.sleep(TICK_SECONDS)
        text = describe_lost(self.job, 0, self.coordinator, self.refused)
        settle(self.end, End(1, f"{text}; all processes of this node were ended"))

    def give_up_connecting(self) -> None:
        if self.coordinator is None:
            text = (
                f"{self.job.name_node(0)} did not answer on port {self.job.ctrl_port} within "
                f"{self.job.start_timeout:g} s ({self.refused}); run the same command there, "
                "and let the port through its firewall"
            )
            settle(self.end, self.error or End(1, text))

    def on_hello(self, channel: Channel, message: dict) -> None:
        self.coordinator = channel

    def on_message(self, channel: Channel, kind: str, fields: dict) -> None:
        if self.end.done():
            return
        if kind == "start":
            self.loop.call_soon(self.start_workers, tuple(fields["master"]))
        elif kind == "hold":
            for worker in self.workers:
                worker.is_ending = True
                worker.hold()
        elif kind == "signal" and self.stop_signal is None:  # once: they finish by themselves
            number = fields["number"]
            # One that is ignored here is ignored by the workers as well.
            self.stop_signal = signal.SIGTERM if is_ignored(number) else number
            for worker in self.workers:
                worker.is_ending = True
                worker.process.send_signal(self.stop_signal)
        elif kind == "end":
            settle(self.end, End(**fields))

    def on_signal(self, number: int) -> None:
        now = time.monotonic()
        first = self.first_signal_at
        if first is not None and now - first < SAME_SIGNAL_SECONDS:
            return
        self.first_signal_at = now if first is None else first
        if self.coordinator is not None:  # which decides, and tells all nodes
            self.coordinator.send("signal", number=number, again=first is not None)
        else:
            settle(self.end, self.error or End(128 + number, "interrupted", at_once=True))

    # Workers.

    def start_workers(self, master: tuple[str, int]) -> None:
        sys.stdout.flush()  # rank 0 writes there as well
        for rank in self.job.ranks:
            terminal = share_terminal() if rank == 0 else ()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", STARTER, str(os.getpid()), *self.command],
                env=worker_environ(self.job, rank, master) | terminal_environ(terminal),
                pass_fds=terminal,
                stdin=self.stdin,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            self.add_worker(Worker(process, job=self.job, rank=rank, has_bar=bool(terminal)))

    def add_worker(self, worker: Worker) -> None:
        self.workers.append(worker)
        self.running.add(worker.rank)
        self.loop.add_reader(worker.stderr, self.read_stderr, worker)

    def read_stderr(self, worker: Worker) -> None:
        if not worker.read_stderr():
            self.loop.remove_reader(worker.stderr)

    def poll_workers(self) -> None:
        for worker in self.workers:
            if worker.rank in self.running and (code := worker.process.poll()) is not None:
                self.on_exit(worker, code)

    def on_exit(self, worker: Worker, code: int) -> None:
        self.running.discard(worker.rank)
        worker.read_stderr()
        worker.flush()
        if self.stop_signal is not None and code == -self.stop_signal:
            code = 128 + self.stop_signal
        if not self.end.done() and self.coordinator is not None:
            end = worker.outcome(code, self.explain)
            self.coordinator.send("exit", rank=worker.rank, end=vars(end))

    async def end_workers(self, end: End) -> None:
        """End what still runs: SIGTERM, and SIGKILL a moment later."""
        for worker in self.workers:
            # What it says of being ended must not stand before why.
            worker.is_shown, worker.is_ending = False, True
        if not end.at_once:
            self.signal_workers(signal.SIGTERM)
            await wait_until(lambda: not self.running, TERM_SECONDS)
        self.signal_workers(signal.SIGKILL)
        await wait_until(lambda: not self.running, REAP_SECONDS)

    def signal_workers(self, number: int) -> None:
        for worker in self.workers:
            worker.signal_group(number)

    def says_why(self) -> bool:
        """Whether it prints why the job ends."""
        return self.error is None or self.job.node_rank == 0

    def report(self, end: End) -> None:
        """Print the one line, and on node 0 what the worker that is the cause said last."""
        interrupted = end.status in STATUSES
        for worker in self.workers:
            if interrupted or end.status == 0 or not end.text:
                worker.release(native=not interrupted)
            worker.finish_printing()
        if end.text and self.says_why():
            report(end.text)
            if self.job.node_rank == 0:
                sys.stderr.writelines(f"    {line}\n" for line in end.tail)


def launch(
    command: Sequence[str],
    *,
    job: Job,
    facts: Callable[[], dict],
    explain: Explain = lambda local_rank, words: None,
    stdin: int | None = subprocess.DEVNULL,
) -> int:
    """Run `command` once per device of the job and return the exit status of this parent.

    Has to be called in the main thread. Raises RunError for a port in use.

    Args:
        facts: checks this machine and returns what has to be the same on every node, by name:
            anything JSON knows; nested dicts are compared name by name. It may raise UsageError,
            RunError or OSError, which ends the job on every node.
        explain: turns what a crashed worker wrote last into one line, where it knows better.
        stdin: that of every worker, as subprocess.Popen takes it.

    Returns:
        0: every worker ended with 0. 1 or 2: the job failed, and one line on stderr says where and
        why. 129, 130 or 143: SIGHUP, SIGINT or SIGTERM came to one of the parents.
    """

    async def run() -> int:
        parent = Parent(command, job=job, facts=facts, explain=explain, stdin=stdin)
        if job.node_rank == 0:
            return await coordinate(parent, Coordinator(job, parent.facts))
        # A name is looked up in each attempt: that of a container may be known only once it runs.
        host, port = job.node_ips[0], job.ctrl_port
        return await parent.run(lambda: open_connection(host, port, family=socket.AF_INET))

    return asyncio.run(run())


async def coordinate(parent: Parent, coordinator: Coordinator) -> int:
    """Run node 0's parent together with the coordinator."""
    listener = listen(parent.job) if parent.job.num_nodes > 1 else None
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(coordinator.serve(*await open_connection(sock=theirs)))
    running = asyncio.create_task(coordinator.run(listener))
    status = await parent.run(lambda: open_connection(sock=ours))
    for number in SIGNALS:  # it only stays to tell others
        if not is_ignored(number):
            parent.loop.add_signal_handler(number, running.cancel)
    with suppress(asyncio.CancelledError):
        await asyncio.gather(running, serving)
    return status
