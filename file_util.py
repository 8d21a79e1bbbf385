"""Files that survive a power cut."""

import os


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
