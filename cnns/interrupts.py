"""Signals that end a run in good order."""

import os
import signal
from types import FrameType

from cnns.errors import RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RunError):
    """A signal asked for the end; the exit status is the one a shell gives it: 130 or 143."""

    def __init__(self, signal_number: int, then: str = ""):
        name = signal.Signals(signal_number).name
        super().__init__(f"interrupted by {name}{then and f'; {then}'}")
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number

    def saying(self, then: str) -> "Interrupted":
        """The same, with what to do next."""
        return Interrupted(self.signal_number, then)


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is kept for `check`; the second kills at once.

    with Interrupts() as interrupts:
        for batch in batches:
            step(batch)
            interrupts.check()
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "Interrupts":
        self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # ends the process even within native code
        name = signal.Signals(number).name
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, f"{name}: ending after this iteration; a second one ends at once.\n".encode())

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)
