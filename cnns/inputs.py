"""What may be opened as a file: opening a FIFO would wait for ever, and a device never ends."""

import os
import stat

from cnns.errors import RunError

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def special_kind(path: str) -> str | None:
    """What `path` leads to where that is not a file. Raises OSError where it leads nowhere."""
    return KINDS.get(stat.S_IFMT(os.stat(path).st_mode))


def refuse_special(path: str) -> None:
    """Raise RunError where `path` leads to something other than a file; OSError where nowhere."""
    kind = special_kind(path)
    if kind is not None:
        raise RunError(f"{path} is {kind}, and a file is needed")


def is_within(path: str, folder: str) -> bool:
    """Whether `path` lies in `folder` once links are followed."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, root]) == root
