"""Files and directories that survive a power cut, and a kill at any moment."""

import ctypes
import errno
import os
import shutil

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


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


def replace_directory(source: str, target: str) -> None:
    """Put the directory `source` in the place of `target`, and remove what was there.

    At every moment `target` is the old or the new one, whole. On a file system that cannot exchange
    two names, the old one is called `<target>.old` for the blink of an eye in which there is no
    `target`. Raises OSError where the disk does.
    """
    if not os.path.isdir(target):
        os.rename(source, target)
        return
    old = f"{target}.old"
    shutil.rmtree(old, ignore_errors=True)
    if exchange(source, target):
        old = source
    else:
        os.rename(target, old)
        os.rename(source, target)
    sync_directory(os.path.dirname(target) or ".")
    shutil.rmtree(old, ignore_errors=True)


def exchange(first: str, second: str) -> bool:
    """Let two paths change places in one step; False where system or file system cannot do it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), second)


def link_files(source: str, target: str) -> None:
    """Make a directory `target` with the files of `source`: hard links, copies where need be."""
    os.makedirs(target)
    for name in os.listdir(source):
        paths = os.path.join(source, name), os.path.join(target, name)
        try:
            os.link(*paths)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
                raise
            with open(paths[0], "rb") as file:
                write_durably(paths[1], file.read())
