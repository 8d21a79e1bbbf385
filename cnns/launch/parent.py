"""Start one process per device here, join the other nodes, watch them, end them all together.

One parent runs on each node, started by the same command. The parent of node 0 listens on
--ctrl_port; the others connect and say what they found on their machine. When all have come and
agree, each parent starts its workers: the same script once more, with the environment variables
from which OneFlow learns its rank. From then on the parents send one another a sign of life every
second.

The parent of node 0 decides when and how a job ends and tells the others. A parent that hears
nothing from it ends by itself. Nothing here needs OneFlow.
"""

import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cnns.errors import report
from cnns.launch import limits
from cnns.launch.channel import Channel, Gone
from cnns.launch.job import Job
from cnns.launch.worker import Exit, Guard, Worker, signal_group, worker_environ


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


def describe_lost(node: str, why: str, *, silent: bool) -> str:
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

    def on_message(self, channel: Channel, message: dict) -> None:
        raise NotImplementedError

    def on_lost(self, channel: Channel, why: str, *, silent: bool = False) -> None:
        raise NotImplementedError

    def on_exit(self, ended: Exit) -> None:
        raise NotImplementedError

    def on_signal(self, number: int, *, again: bool) -> None:
        raise NotImplementedError

    def on_tick(self) -> None:
        """Called in every turn, for what depends on time."""

    # The loop.

    def turn(self) -> None:
        """Wait for a moment and do what has come up."""
        for key, _ in self.selector.select(limits.TICK_SECONDS):
            key.data()
        now = time.monotonic()
        for channel in list(self.channels):
            channel.flush()
            if channel.node is None or channel.told:
                continue
            if now - channel.heard > limits.SILENCE_SECONDS:
                self.read(channel)  # perhaps it was this process that stood still
                if channel in self.channels and now - channel.heard > limits.SILENCE_SECONDS:
                    self.drop(channel)
                    self.on_lost(
                        channel, f"not heard from for {limits.SILENCE_SECONDS:g} s", silent=True
                    )
            elif now - channel.sent >= limits.BEAT_SECONDS:
                channel.send("beat")
        self.poll_workers()
        self.take_signals()
        self.on_tick()

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
                self.on_message(channel, message)
        except Gone as gone:
            self.drop(channel)
            self.on_lost(channel, str(gone))
        except (LookupError, TypeError, ValueError, ArithmeticError):  # JSON, but none of ours
            self.drop(channel)
            self.on_lost(channel, "not a message")

    def take_signals(self) -> None:
        while self.signals:
            when, number = self.signals.pop(0)
            if not self.first_signal:
                self.first_signal = when
                self.on_signal(number, again=False)
            elif when - self.first_signal > limits.SAME_SIGNAL_SECONDS:
                self.on_signal(number, again=True)

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
                self.on_exit(self.describe_exit(worker, code))

    def describe_exit(self, worker: Worker, code: int) -> Exit:
        words = () if code == 0 else worker.last_words()
        known = self.explain(worker.rank - self.job.ranks[0], words) if words else None
        if known is not None:
            return Exit(worker.rank, 1, known, is_explained=True)
        return Exit(worker.rank, code, worker.own_error, worker.fatal, words)

    def calm(self, worker: Worker) -> bool:
        """Whether no crash has followed the lines that were held back."""
        waited = time.monotonic() - worker.held_since > limits.HOLD_SECONDS
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
            kill_at += limits.TERM_SECONDS
            self.signal_workers(signal.SIGTERM)
        while self.running and time.monotonic() < kill_at + limits.REAP_SECONDS:
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
            report(self.end.text)
            if self.job.node_rank == 0:
                sys.stderr.writelines(f"    {line}\n" for line in self.end.tail)
