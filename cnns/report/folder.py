"""The directory of an evaluation's report: all of its files are new, or as they were."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cnns.checkpoint.files import lock_directory, remove_leftovers
from cnns.errors import RunError, UsageError

# The page comes last, so that where it is, the others are.
FILES = (
    "report.json",
    "predictions.csv",
    "classes.csv",
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "reliability.png",
    "mistakes.png",
    "report.html",
)
TEMPORARY = ".report.tmp-"


def check_report_folder(path: str) -> None:
    """Raise UsageError where a report cannot be written to `path`, or would replace other files."""
    ancestor = path
    while not os.path.lexists(ancestor):
        ancestor = os.path.dirname(ancestor) or "."
    if not os.path.isdir(ancestor):
        raise UsageError(f"--report: {ancestor} is not a directory; name another one")
    try:
        held = os.listdir(path) if ancestor == path else []
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=ancestor):
            pass
    except OSError as error:
        raise UsageError(f"--report: cannot write to {ancestor}: {error.strerror}") from None
    held = sorted(name for name in held if not name.startswith(TEMPORARY))
    other = next((name for name in held if name not in FILES), None)
    if other is None and held and FILES[0] not in held:
        other = held[0]
    if other is not None:
        raise UsageError(
            f"--report: {path} holds {other}, which is not of a report; name a new directory, or "
            "that of a report, which is replaced"
        )


@contextmanager
def report_folder(path: str) -> Iterator[Path]:
    """A folder to write files into, which are moved to `path` when all of them are written.

    Raises RunError where the disk is full or the like; `path` is as it was then.
    """
    made, handle = not os.path.isdir(path), None
    temporary = Path(path, f"{TEMPORARY}{os.getpid()}")
    try:
        os.makedirs(path, exist_ok=True)
        remove_leftovers(path, TEMPORARY)
        temporary.mkdir()
        handle = lock_directory(str(temporary))
        yield temporary
        Path(path, FILES[-1]).unlink(missing_ok=True)
        for name in FILES:
            if (temporary / name).exists():
                os.replace(temporary / name, Path(path, name))
            else:
                Path(path, name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write the report to {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)
        if made:
            with suppress(OSError):  # it holds the report
                os.rmdir(path)
