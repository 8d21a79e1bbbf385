"""What ends a script: its errors, each one line on stderr, and the exit status."""

import os
import sys
from collections.abc import Callable


class UsageError(Exception):
    """Wrong usage, found before anything is loaded: one line, exit status 2."""

    exit_status = 2


class RunError(Exception):
    """A run that failed, or data that are broken: one line, exit status 1."""

    exit_status = 1


def run_main(
    main: Callable[[], int | None], leave: Callable[[int], int] = lambda status: status
) -> int:
    """Call `main` and return the exit status; what the user or the system did becomes one line.

    Args:
        main: returns an exit status, or None for 0.
        leave: called with the status of a failure while all that `main` had made still exists. A
            worker of a job must not wait for the end of that: see cnns.launch.worker.leave.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except (UsageError, RunError, KeyboardInterrupt, MemoryError, OSError) as error:
        return leave(explain(error))
    return status


def explain(error: BaseException) -> int:
    """Report what ended a run, and return the exit status."""
    status, text = describe(error)
    if isinstance(error, BrokenPipeError):  # `| head`: whoever read our lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
    else:
        report(text)
    return status


def describe(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for what the user or the system did."""
    if isinstance(error, UsageError | RunError):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, MemoryError):
        return 1, f"out of memory: {error}"
    if isinstance(error, OSError) and error.filename:
        return 1, f"{error.strerror}: {error.filename}"
    return 1, str(error)


def printable(text: str) -> str:
    """Text with control characters, and bytes of file names that are not UTF-8, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else escape(c) for c in text)


def escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as os.fsdecode gives it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def report(error: object) -> None:
    """Print `error` as the one line `<script>: error: <what>` on stderr."""
    line = printable(" ".join(str(error).split()))
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
