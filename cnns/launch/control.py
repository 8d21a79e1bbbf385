"""A rank that another launcher has started, as seen from itself: its line to the watcher.

The watcher (cnns.launch.watcher) is a small process beside the rank that is connected to those of
the other ranks. A rank tells it of its end, a line, and of each signal, a byte that Python writes
even where the signal falls into native code. It tells the rank of signals that came to others, and
when to leave, so that no rank is gone before the reason is printed and the others know it.
"""

import atexit
import ctypes
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType

from cnns import interrupts

CONTROL_MARK = "CNNS_CONTROL"  # the number of the file descriptor
TELL_SECONDS = 0.5  # for the watcher to tell the others of a signal that ends this rank
watcher: socket.socket | None = None  # None: this process was started by a parent of ours


def attach() -> None:
    """To be called before OneFlow is imported; does nothing where there is no watcher."""
    global watcher
    number = os.environ.pop(CONTROL_MARK, None)
    if number is None:
        return
    watcher = socket.socket(fileno=int(number))
    watcher.set_inheritable(False)
    watcher.setblocking(False)  # else it cannot be the one that signals are written to
    signal.set_wakeup_fd(watcher.fileno(), warn_on_full_buffer=False)
    interrupts.has_watcher = True
    for each in interrupts.watched():
        signal.signal(each, end_by_signal)
    # OneFlow aborts when another rank is gone. `sleep`, called with the number of SIGABRT, which is
    # 6, gives the watchers seconds to say which; with its first process a container is gone.
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), libc.sleep)
    threading.Thread(target=obey, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)  # not in that thread
    # The first that is registered runs last, when OneFlow has ended. A failure does not get there.
    atexit.register(leave, 0)


def tell(text: str) -> None:
    assert watcher is not None
    with suppress(OSError):  # the watcher is gone: `obey` knows
        watcher.sendall(f"{text}\n".encode())


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """Outside of training a signal ends this rank at once, and by the watchers all others."""
    tell(f"exit {128 + number}")
    time.sleep(TELL_SECONDS)
    os._exit(128 + number)


def leave(status: int) -> None:
    """Leave with a status; with that of the job, once it has ended, where there is a watcher."""
    if watcher is None:
        os._exit(status)
    tell(f"exit {status}")
    while True:  # until `obey` leaves
        time.sleep(60)


def obey() -> None:
    """Take signals of other ranks from the watcher, and leave when it says so, or is gone."""
    assert watcher is not None
    rest = b""
    while True:
        select.select([watcher], [], [])
        data = b""
        with suppress(ConnectionError):
            data = watcher.recv(1 << 12)
        if not data:
            os._exit(1)
        *lines, rest = (rest + data).split(b"\n")
        for kind, number in map(bytes.split, lines):
            if kind == b"exit":
                os._exit(int(number))
            os.kill(os.getpid(), int(number))
