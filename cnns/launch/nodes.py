"""The parents of node 0, which decides how a job ends, and of the other nodes; and `launch`."""

import json
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

from cnns.errors import RunError, UsageError, report
from cnns.launch import limits
from cnns.launch.channel import MAGIC, PROTOCOL, Channel, Gone, brief, difference
from cnns.launch.job import MAX_STRANGERS, Job, listen, reserve_port, resolve
from cnns.launch.parent import ABORT, DEATH, Cause, End, Explain, Parent, cause_of, describe_lost
from cnns.launch.worker import Exit


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

    def on_message(self, channel: Channel, message: dict) -> None:
        kind = message["kind"]
        if channel.node is None:
            self.greet(channel, message)
        elif kind == "exited":
            self.on_exit(Exit(**message["exit"] | {"tail": tuple(message["exit"]["tail"])}))
        elif kind == "signal":
            self.stop(int(message["number"]), channel.node, again=bool(message["at_once"]))
        elif kind == "ended":
            self.drop(channel)
            self.on_lost(channel, "it ended first")

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

    def on_lost(self, channel: Channel, why: str, *, silent: bool = False) -> None:
        node = channel.node
        if node is None or self.nodes.get(node) is not channel or self.end is not None:
            return
        if not self.started:  # it may come again
            del self.nodes[node]
            return
        text = describe_lost(self.job.node(node), why, silent=silent)
        self.fail(Cause(DEATH, f"{text}; all processes were ended"), wait=not silent)

    def on_exit(self, ended: Exit) -> None:
        self.working.discard(ended.rank)
        if self.end is not None:
            return
        stop = {130: signal.SIGINT, 143: signal.SIGTERM}.get(ended.code)
        if stop is not None or self.stop_signal is not None and ended.code == -self.stop_signal:
            self.stopped = True
            self.stop_deadline = self.stop_deadline or time.monotonic() + limits.STOP_SECONDS
            self.stop_signal = self.stop_signal or stop  # somebody sent it to the workers
        elif ended.code != 0:
            self.fail(cause_of(self.job, ended))
        if not self.working:
            self.decide()

    def fail(self, cause: Cause, *, wait: bool = True) -> None:
        self.causes.append(cause)
        for worker in self.workers:
            worker.holding = True
        decide_at = time.monotonic() + (limits.GATHER_SECONDS if wait else 0)
        self.decide_at = min(self.decide_at or decide_at, decide_at)

    def decide(self) -> None:
        """Say how the job ends, from what has come in."""
        causes = self.causes
        if self.stopped:  # processes that are left alone abort
            causes = [cause for cause in causes if cause.order != ABORT]
            if self.working and not causes:  # perhaps rank 0 is still saving
                limit = time.monotonic() + limits.SILENCE_SECONDS
                self.stop_deadline, self.decide_at = min(self.stop_deadline, limit), 0
                return
        if causes:
            cause = min(causes, key=lambda cause: cause.order)  # the first of the best
            self.settle(End(cause.status, cause.text, tail=cause.tail))
        else:
            self.settle(End(128 + self.stop_signal if self.stopped else 0))

    def on_signal(self, number: int, *, again: bool) -> None:
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
            self.stop_deadline = self.stop_deadline or time.monotonic() + limits.STOP_SECONDS
            for channel in self.nodes.values():
                channel.send("signal", number=number)

    def on_tick(self) -> None:
        now = time.monotonic()
        for channel in list(self.channels):
            if channel.node is None and now - channel.opened > limits.HELLO_SECONDS:
                self.drop(channel)
        if self.end is not None:
            return
        if not self.started and now > self.deadline:
            missing = [n for n in range(1, self.job.num_nodes) if n not in self.nodes]
            self.end = End(
                1,
                f"{', '.join(map(self.job.node, missing))} did not connect to "
                f"{self.job.node_ips[0]} port {self.job.ctrl_port} within "
                f"{self.job.start_timeout:g} s; run the same command on every node",
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
            self.deadline = time.monotonic() + min(limits.TELL_SECONDS, self.job.start_timeout)
            missing = self.job.num_nodes - 1 if self.end.stay and self.listener else 0
            while self.num_met < missing and time.monotonic() < self.deadline:
                self.turn()
        self.end_workers()
        deadline = time.monotonic() + limits.TERM_SECONDS + limits.REAP_SECONDS
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
            report(self.error.text)
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
                    Channel(
                        socket.create_connection(address, timeout=limits.BEAT_SECONDS), address[0]
                    )
                )
            except OSError as error:
                self.refused = error.strerror or str(error)
                time.sleep(limits.TICK_SECONDS)
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
        deadline = time.monotonic() + limits.HELLO_SECONDS
        while channel in self.channels and self.end is None and not self.welcomed:
            self.turn()
            if time.monotonic() > deadline:
                self.drop(channel)
                self.refused = "what listens there does not answer"

    def on_message(self, channel: Channel, message: dict) -> None:
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

    def on_lost(self, channel: Channel, why: str, *, silent: bool = False) -> None:
        if not self.welcomed:
            self.refused = why
            time.sleep(limits.TICK_SECONDS)
        elif self.end is None:
            text = describe_lost(self.job.node(0), why, silent=silent)
            self.end = End(1, f"{text}; all processes of this node were ended")

    def on_exit(self, ended: Exit) -> None:
        if self.end is None:
            self.channel.send("exited", exit=vars(ended))

    def on_signal(self, number: int, *, again: bool) -> None:
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
            deadline = time.monotonic() + limits.REAP_SECONDS
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
