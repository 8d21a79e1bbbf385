"""Files of the user's: ordinary ones only, and none that a link brings in unasked."""

import errno
import os
import stat

KINDS = {
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def check_ordinary(path: str | os.PathLike) -> None:
    """Raise OSError where a path is not a file, before anything waits for what is behind it."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "is something else")
        raise OSError(errno.EINVAL, f"it {kind}, and a file is needed", os.fspath(path))


def is_within(path: str, folder: str) -> bool:
    """Whether `path` lies in `folder` once links are followed."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, root]) == root
