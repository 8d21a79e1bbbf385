"""How scripts end: errors, each one line on stderr, and exit statuses."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TextIO

# Control characters, and marks that reverse the direction of text.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

OF_THE_SYSTEM = (MemoryError, OSError, RecursionError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(Exception):
    """Wrong usage, found before anything is loaded: one line, exit status 2."""

    exit_status = 2


class RunError(Exception):
    """A run that failed, or broken data: one line, exit status 1."""

    exit_status = 1


def printable(text: str) -> str:
    """A text with names from outside, its control characters escaped for a terminal."""
    return CONTROLS.sub(lambda match: escape(match[0]), text)


def escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name, as os.fsdecode gives it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return ascii(character)[1:-1]


def open_streams() -> None:
    """Make every name printable, whatever the encoding of the terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_main(
    main: Callable[[], int | None], leave: Callable[[int], int] = lambda status: status
) -> int:
    """Call `main` and return the exit status; errors of the user or the system become one line.

    Args:
        main: returns an exit status, or None for 0.
        leave: called with the status of a failure before what `main` made is destroyed. A worker
            of a job must not wait for that: see cnns.launch.worker.leave.
    """
    open_streams()
    try:
        status = main() or 0
        sys.stdout.flush()
    except (UsageError, RunError, KeyboardInterrupt, *OF_THE_SYSTEM) as error:
        return leave(explain(error))
    return status


def explain(error: BaseException) -> int:
    """Report what ended a run, and return the exit status."""
    status, text = describe(error)
    if isinstance(error, BrokenPipeError):  # `| head`: the reader has closed the pipe
        forget(sys.stdout)
    else:
        report(text)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk behind it: Python would try again, and exit with 120
            forget(sys.stdout)
    return status


def describe(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for an error of the user or the system."""
    if isinstance(error, UsageError | RunError):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, MemoryError):
        return 1, f"out of memory: {error}"
    if isinstance(error, RecursionError):  # os.makedirs calls itself for each folder
        return 1, "a path has too many folders in one another; give a shorter one"
    if isinstance(error, OSError) and error.filename:
        return 1, f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.errno in FULL:
        return 1, f"cannot write to standard output, or a file of this run: {error.strerror}"
    return 1, getattr(error, "strerror", None) or str(error)


def report(error: object) -> None:
    """Print `error` as the one line `<script>: error: <what>` on stderr."""
    line = " ".join(str(error).split())
    say(f"{os.path.basename(sys.argv[0])}: error: {line}", sys.stderr)


listeners: list[Callable[[str], None]] = []  # get each line that is said
# What is entered around each line that is said: a progress bar steps aside.
aside: list[Callable[[], AbstractContextManager]] = []


def say(line: str, file: TextIO) -> None:
    """Print a line. A terminal that is gone is not an error: SIGHUP decides what happens."""
    line = printable(line)
    for listener in listeners:
        listener(line)
    try:
        with ExitStack() as stack:
            for enter in aside:
                stack.enter_context(enter())
            print(line, file=file, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        forget(file)


def forget(file: TextIO) -> None:
    """Redirect a stream that nobody reads to /dev/null, as Python flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
