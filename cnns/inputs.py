"""The user's files: ordinary ones only, each read once, and no links out of the input folders."""

import errno
import os
import stat
from array import array
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from cnns.errors import RunError

# Of what a compressed file may become: this much, or this many times its size where that is more.
# MNIST becomes 5 times as large, CIFAR 1.1 times; a malicious file, 1000 times.
MAX_UNPACKED_BYTES = 256 << 20
MAX_RATIO = 50

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: str | os.PathLike) -> str:
    """What a path leads to, without opening it: a FIFO would block. Raises OSError."""
    return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "something else")


def check_ordinary(path: str | os.PathLike) -> None:
    """Raise OSError where a path is not a file, before anything blocks on it."""
    kind = kind_of(path)
    if kind == "a directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != "a file":
        raise OSError(errno.EINVAL, f"it is {kind}, and a file is needed", os.fspath(path))


def is_within(path: str, folder: str) -> bool:
    """Whether `path` lies in `folder` once links are followed."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, root]) == root


def open_input(path: str | os.PathLike, *, buffering: int = -1) -> BinaryIO:
    """An ordinary file, open for reading. Raises OSError for anything else; never waits."""
    check_ordinary(path)
    return open(path, "rb", buffering=buffering)


def unpacked_limit(packed_bytes: int) -> int:
    """How many bytes a compressed file of this size may become."""
    return max(MAX_UNPACKED_BYTES, MAX_RATIO * packed_bytes)


class Tree:
    """Walks folders of input so that no file is read twice and no link leads out of them.

    A link to a file or a folder outside of `root` is refused unless `follow_links`; so is, always,
    a folder that was walked before, which ends loops, and a file that has two names.
    """

    def __init__(self, root: str | os.PathLike, *, follow_links: bool = False):
        self.root = os.path.realpath(root)
        self.follow_links = follow_links
        self.folders: dict[tuple[int, int], str] = {}
        # Of each file: only references and numbers, as there may be millions.
        self.folders_of: list[str] = []
        self.paths: list[str] = []
        self.devices, self.inodes = array("Q"), array("Q")

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a folder) of what a folder holds, by name, without hidden folders.

        Raises OSError, and RunError for a link that is refused or a folder that was seen before.
        """
        state = os.stat(folder)
        seen = self.folders.setdefault((state.st_dev, state.st_ino), folder)
        if seen != folder:
            raise RunError(
                f"{folder}: is the same folder as {seen}, and every image may be there only once; "
                "remove the link"
            )
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                is_folder = entry.is_dir()
                if not (is_folder and entry.name.startswith(".")):
                    if entry.is_symlink():
                        self.check_link(entry.path)
                    yield entry.name, is_folder

    def check_link(self, path: str) -> None:
        """Raise RunError where a link leads out of the root."""
        if not (self.follow_links or is_within(path, self.root)):
            target = os.path.realpath(path)
            raise RunError(
                f"{path}: is a link to {target}, which is outside of {self.root}; remove it, or "
                "give --follow_links"
            )

    def add(self, folder: str, path: str) -> None:
        """Record a file that will be read. One that `stat` fails on is left to its reader."""
        try:
            state = os.stat(os.path.join(folder, path))
        except OSError:
            return
        self.folders_of.append(folder)
        self.paths.append(path)
        self.devices.append(state.st_dev)
        self.inodes.append(state.st_ino)

    def check_once(self) -> None:
        """Raise RunError where two of the files are one, by a link or a hard link."""
        devices, inodes = np.asarray(self.devices), np.asarray(self.inodes)
        order = np.lexsort((inodes, devices))
        same = (np.diff(inodes[order]) == 0) & (np.diff(devices[order]) == 0)
        for k in np.flatnonzero(same):
            names = [os.path.join(self.folders_of[i], self.paths[i]) for i in order[k : k + 2]]
            first, second = sorted(names)
            raise RunError(
                f"{second}: is the same file as {first}, and every image may be there only once; "
                "remove one of them"
            )
