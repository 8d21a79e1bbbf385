"""OFRecord on disk: names of parts, framing, manifest. Nothing here needs OneFlow."""

import json
import os
import struct

from cnns.errors import RunError

MANIFEST = "manifest.json"
PART_PREFIX = "part-"
MAX_CLASSES = 1_000_000  # more is a slip of the keyboard, or not a label
MAX_RECORD_BYTES = 1 << 30  # a longer length is garbage, not an image


def read_manifest(directory: str) -> dict | None:
    """The manifest of an OFRecord directory, or None where it has none.

    Raises RunError where the file is not a manifest of ours.
    """
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        well_formed = (
            bool(manifest["parts"])
            and all(
                isinstance(part["name"], str)
                and isinstance(part["num_examples"], int)
                and isinstance(part["num_bytes"], int)
                for part in manifest["parts"]
            )
            and isinstance(manifest.get("num_classes"), int | None)
            and all(isinstance(name, str) for name in manifest.get("classes") or ())
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise RunError(
            f"{path} is not a manifest that can be read; remove it to have the parts counted, or "
            "make the data set anew"
        )
    return manifest


def count_records(path: str) -> int:
    """Number of records of one part, found by walking its length fields.

    A part is a sequence of (int64 little-endian length, message of that length).

    Raises RunError, with record number and byte offset, where the file ends within a record or a
    length is impossible.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return walk_records(file.fileno(), path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def walk_records(fd: int, path: str) -> int:
    size = os.fstat(fd).st_size
    offset = count = 0
    while offset < size:
        where = f"{path}: record {count}, at byte {offset},"
        cut_off = RunError(
            f"{where} is cut off at byte {size}, the end of the file; copy the part again, or make "
            "it anew"
        )
        field = os.pread(fd, 8, offset)
        if len(field) < 8:
            raise cut_off
        (length,) = struct.unpack("<q", field)
        if not 0 < length < MAX_RECORD_BYTES:
            raise RunError(
                f"{where} claims a length of {length} bytes: the part is damaged or is not an "
                "OFRecord file; copy it again, or make it anew"
            )
        offset += 8 + length
        if offset > size:
            raise cut_off
        count += 1
    return count
