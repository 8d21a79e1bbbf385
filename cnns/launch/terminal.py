"""The terminal that a job was started on: rank 0 draws its bar there, and its parent prints above.

The parent passes on what rank 0 says, so rank 0 has no terminal of its own: it is handed a
descriptor of the parent's. Each of the two writes whole lines, and begins by erasing the bar, which
is drawn again by its next step. Nothing here needs OneFlow.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from cnns import errors

MARK = "CNNS_TERMINAL"  # the number of the descriptor
ERASE = "\r\x1b[K"  # the line that the cursor is in


# In the parent.


def share_terminal() -> tuple[int, ...]:
    """A descriptor for rank 0 where stderr is a terminal; from then on, print above the bar."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return ()
    errors.aside.append(above_the_bar)
    return (os.dup(2),)


@contextmanager
def above_the_bar() -> Iterator[None]:
    sys.stderr.write(ERASE)
    sys.stderr.flush()
    yield


def terminal_environ(descriptors: tuple[int, ...]) -> dict[str, str]:
    """What tells a worker of the descriptor that it is handed."""
    return {MARK: str(descriptors[0])} if descriptors else {}


# In a worker, and in a process that has no parent.


def find_terminal() -> TextIO | None:
    """What a bar can be drawn on."""
    if MARK in os.environ:
        number = int(os.environ[MARK])
        return open(number, "w", encoding=sys.stderr.encoding, errors="replace", closefd=False)
    return sys.stderr if sys.stderr.isatty() else None
