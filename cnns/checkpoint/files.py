"""Files and directories that survive a power cut, and a kill at any moment."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cnns.errors import RunError

OLD = ".old"


def write_durably(path: str | os.PathLike, data: bytes) -> None:
    """Write a file and wait until it is on disk. Raises OSError where the disk does."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: str | os.PathLike) -> None:
    """Wait until the names in a directory are on disk. Raises OSError where the disk does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: str) -> str:
    """A name beside `path` for what is not a snapshot, or is one no longer."""
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{name}.tmp-{os.getpid()}")


@contextmanager
def writing(path: str, *, replace: bool = False) -> Iterator[str]:
    """A new directory under a temporary name, which is renamed to `path` when it is complete.

    Nothing is left of it after an error. A directory that it replaces is called `<path>.old` for
    the moment between two renames, so that after a kill at any time the old or the new one is there
    whole, under one of the two names: `current` finds it, and the next `writing` tidies up.

    Raises RunError where the disk is full or the like.
    """
    temporary, old = temporary_name(path), path + OLD
    parent, name = os.path.split(path)
    handle = None
    try:
        remove_leftovers(parent, f".{name}.tmp-")
        os.makedirs(temporary)
        handle = hold(temporary)
        yield temporary
        sync_directory(temporary)
        if replace and os.path.isdir(path):
            remove_directory(old)
            os.rename(path, old)
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path) or ".")
        if replace:
            remove_directory(old)
    except OSError as error:
        if replace and not os.path.exists(path):
            with suppress(OSError):
                os.rename(old, path)
        raise RunError(
            f"cannot save the model to {path}: {error.strerror}; earlier snapshots are untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def hold(directory: str) -> int:
    """Let nobody take a temporary directory for a leftover until the handle is closed.

    Raises OSError.
    """
    handle = os.open(directory, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def leftovers(parent: str, start: str) -> list[str]:
    """Temporary directories in `parent`, of names that begin with `start`, that nobody holds.

    Processes that were killed have left them.
    """
    try:
        names = os.listdir(parent or ".")
    except OSError:
        return []
    found = [os.path.join(parent, n) for n in names if n.startswith(start) and ".tmp-" in n]
    return [path for path in found if not is_held(path)]


def remove_leftovers(parent: str, start: str) -> None:
    for path in leftovers(parent, start):
        shutil.rmtree(path, ignore_errors=True)


def is_held(directory: str) -> bool:
    """Whether a process that is alive is writing to a temporary directory."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # not a directory
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)


def current(path: str) -> str:
    """`path`, or `<path>.old` where a kill came while that was being replaced."""
    return path + OLD if os.path.isdir(path + OLD) and not os.path.exists(path) else path


def remove_directory(path: str) -> None:
    """Remove a directory, if it is there, which is whole until then. Raises OSError."""
    if os.path.isdir(path):
        os.rename(path, temporary_name(path))
        shutil.rmtree(temporary_name(path), ignore_errors=True)
