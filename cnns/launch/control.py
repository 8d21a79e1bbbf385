"""A rank that another launcher has started, as seen from itself: its line to the watcher.

The watcher (cnns.launch.watcher) is a small process beside the rank that is connected to those of
the other ranks. A rank tells it of signals and of its end, each a line; it tells the rank of
signals that came to others, and when to leave, so that no rank is gone before the reason is printed
and the others know it.
"""

import atexit
import ctypes
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType

from cnns import interrupts

CONTROL_MARK = "CNNS_CONTROL"  # the number of the file descriptor
TELL_SECONDS = 0.5  # for the watcher to tell the others of a signal that ends this rank
line: socket.socket | None = None  # None: this process was started by a parent of ours
is_passed_on = False  # the next signal: it came to another rank


def attach() -> None:
    """To be called before OneFlow is imported; does nothing where there is no watcher."""
    global line
    number = os.environ.pop(CONTROL_MARK, None)
    if number is None:
        return
    line = socket.socket(fileno=int(number))
    line.set_inheritable(False)
    interrupts.relay = tell_signal
    for each in interrupts.watched():
        signal.signal(each, end_by_signal)
    # OneFlow aborts when another rank is gone. `sleep`, called with the number of SIGABRT, which is
    # 6, gives the watchers seconds to say which; with its first process a container is gone.
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), libc.sleep)
    threading.Thread(target=obey, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)  # not in that thread
    # The first that is registered runs last, when OneFlow has ended. A failure does not get there.
    atexit.register(end, 0)


def tell(text: str) -> None:
    assert line is not None
    with suppress(OSError):  # the watcher is gone: `obey` knows
        line.sendall(f"{text}\n".encode())


def tell_signal(number: int) -> None:
    """Tell of a signal that was sent to this rank."""
    global is_passed_on
    if not is_passed_on:
        tell(f"signal {number}")
    is_passed_on = False


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """Outside of training a signal ends this rank at once, and by the watchers all others."""
    tell_signal(number)
    tell(f"exit {128 + number}")
    time.sleep(TELL_SECONDS)
    os._exit(128 + number)


def end(status: int) -> None:
    """Leave with a status; with that of the job, once it has ended, where there is a watcher."""
    if line is None:
        os._exit(status)
    tell(f"exit {status}")
    while True:  # until `obey` leaves
        time.sleep(60)


def obey() -> None:
    """Take signals of other ranks from the watcher, and leave when it says so, or is gone."""
    global is_passed_on
    assert line is not None
    with line.makefile() as lines:
        for kind, number in map(str.split, lines):
            if kind == "exit":
                os._exit(int(number))
            is_passed_on = True
            os.kill(os.getpid(), int(number))
    os._exit(1)
