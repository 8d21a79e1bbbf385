"""Signals that end a run cleanly."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from cnns.errors import RunError

# SIGHUP: the connection to the terminal is lost.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STATUSES = tuple(128 + number for number in SIGNALS)  # of a clean end


# Whether another launcher has started this process: its watcher decides what a second one means.
has_watcher = False


class Interrupted(RunError):
    """A signal ended the run; the exit status is the shell's for it: 130, 143 or 129."""

    def __init__(self, signal_number: int, then: str = ""):
        name = signal.Signals(signal_number).name
        super().__init__(f"interrupted by {name}{then and f'; {then}'}")
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number

    def saying(self, then: str) -> "Interrupted":
        """The same, with what to do next."""
        return Interrupted(self.signal_number, then)


def is_ignored(number: int) -> bool:
    """Whether this process was started with a signal ignored, as nohup does."""
    return signal.getsignal(number) is signal.SIG_IGN


def watched() -> list[signal.Signals]:
    """The signals that end a run: all except an ignored SIGHUP."""
    return [n for n in SIGNALS if n != signal.SIGHUP or not is_ignored(n)]


def exit_on_signals() -> None:
    """Let SIGTERM, and a SIGHUP that is not ignored, end this process by SystemExit: 143 or 129.

    So `finally` cleans up. Further ones are ignored meanwhile.
    """
    for number in watched():
        if number != signal.SIGINT:  # which raises KeyboardInterrupt
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    for each in watched():
        if each != signal.SIGINT:
            signal.signal(each, signal.SIG_IGN)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:  # the terminal is gone, and what is still to be said must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    sys.exit(128 + number)


class Interrupts:
    """While entered, the first of SIGNALS is kept for `check`; the second kills at once.

    Where another launcher has started this process, its watcher does that: launchers signal
    processes and their groups, so two within a second are one. A SIGHUP that is ignored stays so.

    with Interrupts() as interrupts:
        for batch in batches:
            step(batch)
            interrupts.check()
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "Interrupts":
        self.previous = {number: signal.signal(number, self.receive) for number in watched()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = number
        for each in watched() if not has_watcher else ():
            signal.signal(each, signal.SIG_DFL)  # ends the process even within native code
        name = signal.Signals(number).name
        line = f"{name}: ending after this iteration; a second one ends at once.\n"
        with suppress(OSError):  # the terminal is gone
            os.write(2, line.encode())  # not `print`, which the signal may have interrupted

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received)
