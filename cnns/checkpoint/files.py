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
    """A name beside `path` for a directory that is being written or removed."""
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{name}.tmp-{os.getpid()}")


@contextmanager
def atomic_directory(path: str, *, replace: bool = False) -> Iterator[str]:
    """A new directory under a temporary name, which is renamed to `path` when it is complete.

    After an error it is removed. A directory that it replaces is called `<path>.old` between two
    renames, so a kill at any time leaves the old or the new one complete, under one of the two
    names: `existing_path` finds it, and the next `atomic_directory` cleans up.

    Raises RunError where the disk is full or the like.
    """
    temporary, old = temporary_name(path), path + OLD
    parent, name = os.path.split(path)
    handle = None
    try:
        remove_leftovers(parent, f".{name}.tmp-")
        os.makedirs(temporary)
        handle = lock_directory(temporary)
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


def try_lock(handle: int) -> bool:
    """Lock an open file or directory until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def lock_directory(directory: str) -> int:
    """Keep a temporary directory from being removed as a leftover until the handle is closed.

    Raises OSError.
    """
    handle = os.open(directory, os.O_RDONLY)
    try_lock(handle)
    return handle


def find_leftovers(parent: str, start: str) -> list[str]:
    """Unlocked temporary directories in `parent` whose names begin with `start`.

    They were left behind by processes that were killed.
    """
    try:
        names = os.listdir(parent or ".")
    except OSError:
        return []
    found = [os.path.join(parent, n) for n in names if n.startswith(start) and ".tmp-" in n]
    return [path for path in found if not is_locked(path)]


def remove_leftovers(parent: str, start: str) -> None:
    for path in find_leftovers(parent, start):
        shutil.rmtree(path, ignore_errors=True)


def is_locked(directory: str) -> bool:
    """Whether a live process is writing to a temporary directory."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # not a directory
        return True
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


def existing_path(path: str) -> str:
    """`path`, or `<path>.old` where a run was killed while it replaced `path`."""
    return path + OLD if os.path.isdir(path + OLD) and not os.path.exists(path) else path


def remove_directory(path: str) -> None:
    """Remove a directory if it exists; a kill leaves no half of it. Raises OSError."""
    if os.path.isdir(path):
        os.rename(path, temporary_name(path))
        shutil.rmtree(temporary_name(path), ignore_errors=True)
