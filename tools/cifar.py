"""The binary archives of CIFAR-10 and CIFAR-100, as arrays.

A file is a sequence of records: one label (CIFAR-10) or a coarse and a fine one (CIFAR-100), one
byte each, then 3 x 32 x 32 bytes, the red, the green and the blue plane.
"""

import bz2
import gzip
import lzma
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cnns.convert.writer import BLOCK_BYTES
from cnns.errors import RunError, UsageError
from cnns.inputs import open_input, unpacked_limit
from tools.imagenet import Window, walk_tar

PLANES = (3, 32, 32)
CIFAR_10 = {
    "train": [f"data_batch_{k}.bin" for k in range(1, 6)],
    "validation": ["test_batch.bin"],
}
CIFAR_100 = {"train": ["train.bin"], "validation": ["test.bin"]}
# By the kind of labels: files by split, file of the class names, label bytes of a record, and which
# of them is the label.
FORMATS = {
    None: (CIFAR_10, "batches.meta.txt", 1, 0),
    "coarse": (CIFAR_100, "coarse_label_names.txt", 2, 0),
    "fine": (CIFAR_100, "fine_label_names.txt", 2, 1),
}
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
NAME_FILES = [names for _, names, _, _ in FORMATS.values()]


def read_files(path: Path) -> dict[str, bytes]:
    """The files of an archive, or of the folder it was unpacked to, by their base names."""
    wanted = {*NAME_FILES, *sum([*CIFAR_10.values(), *CIFAR_100.values()], [])}
    try:
        if path.is_dir():
            return {name: read_file(path / name) for name in wanted if (path / name).exists()}
        with open_input(path) as packed, tempfile.TemporaryFile() as plain:
            unpack(packed, plain, path)
            whole = Window(plain.fileno(), 0, plain.tell())
            return {
                os.path.basename(name): os.pread(plain.fileno(), size, offset)
                for name, offset, size in walk_tar(whole, str(path))
                if os.path.basename(name) in wanted
            }
    except OSError as error:
        raise UsageError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def read_file(path: Path) -> bytes:
    with open_input(path) as file:
        return file.read()


def unpack(packed: BinaryIO, plain: BinaryIO, path: Path) -> None:
    """Write a tar archive, compressed or not, to `plain`. Raises RunError where that fails."""
    head = packed.read(6)
    packed.seek(0)
    openers: list[Any] = [opener for magic, opener in COMPRESSED.items() if head.startswith(magic)]
    source = openers[0](packed) if openers else packed
    limit = unpacked_limit(os.fstat(packed.fileno()).st_size)
    while True:
        try:
            block = source.read(BLOCK_BYTES)
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise RunError(f"{path}: is not a complete tar archive: {error}") from None
        if not block:
            plain.flush()
            return
        plain.write(block)
        if plain.tell() > limit:
            raise RunError(f"{path}: unpacks to more than {limit} bytes; CIFAR is smaller")


def read_names(files: dict[str, bytes], name: str, path: Path) -> list[str]:
    try:
        names = [line.strip() for line in files[name].decode().splitlines()]
    except UnicodeDecodeError:
        raise RunError(f"{path}: {name} is not UTF-8 text") from None
    names = [name for name in names if name]
    if not names:
        raise RunError(f"{path}: {name} is empty")
    return names


def read_cifar(
    path: Path, *, labels: str | None
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, list[str]]], list[str]]:
    """Images (N, 32, 32, 3) uint8 RGB, labels (N,) uint8 and names by split; and the class names.

    `labels` is "fine" or "coarse", for CIFAR-100 only; None: fine.
    Raises UsageError where the archive cannot be read, RunError where its content is wrong.
    """
    files = read_files(path)
    if NAME_FILES[0] in files:
        if labels is not None:
            raise UsageError(f"--labels={labels}: {path} is CIFAR-10, which has one kind of labels")
    elif all(name in files for name in NAME_FILES[1:]):
        labels = labels or "fine"
    else:
        raise UsageError(
            f"--input={path}: holds neither batches.meta.txt nor fine_label_names.txt; needs "
            "the binary version of CIFAR-10 or CIFAR-100 (cifar-10-binary.tar.gz, "
            "cifar-100-binary.tar.gz), or the folder it was unpacked to"
        )
    by_split, name_file, label_bytes, at = FORMATS[labels]
    classes = read_names(files, name_file, path)
    width = label_bytes + int(np.prod(PLANES))
    splits = {}
    for split, parts in by_split.items():
        images, held, names = [], [], []
        for part in parts:
            if part not in files:
                raise RunError(f"{path}: {part} is missing")
            data = np.frombuffer(files[part], np.uint8)
            if not len(data) or len(data) % width:
                raise RunError(
                    f"{path}: {part} holds {len(data)} bytes, which is not a multiple of {width}, "
                    "the bytes of an image and its label"
                )
            records = data.reshape(-1, width)
            wrong = np.flatnonzero(records[:, at] >= len(classes))
            if len(wrong):
                raise RunError(
                    f"{path}: {part}: label {records[wrong[0], at]} of image {wrong[0]} is outside "
                    f"of the {len(classes)} classes of {name_file}"
                )
            images.append(records[:, label_bytes:].reshape(-1, *PLANES).transpose(0, 2, 3, 1))
            held.append(records[:, at])
            names += [f"{part}[{i}]" for i in range(len(records))]
        splits[split] = np.concatenate(images), np.concatenate(held), names
    return splits, classes
