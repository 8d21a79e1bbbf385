"""OFRecord on disk: messages, names of parts, framing, manifest. Nothing here loads OneFlow."""

import importlib.util
import json
import os
import re
import runpy
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from cnns.checkpoint.files import sync_directory, write_durably
from cnns.errors import RunError
from cnns.inputs import open_input
from cnns.jsonfile import Damaged, anything, integer, listed, optional, read_json, record, string

MANIFEST = "manifest.json"
FORMAT_VERSION = 1  # of the manifest
PART_PREFIX = "part-"
PART_NAME = re.compile(re.escape(PART_PREFIX) + r"(\d+)")
LENGTH = struct.Struct("<q")  # stands before each message of a part
TEMPORARY = ".tmp"  # end of the name of a file that is not whole
MAX_CLASSES = 1_000_000  # more is a typing error, or not a label
MAX_RECORD_BYTES = 1 << 30  # a longer length is garbage, not an image


# Messages.


def _message_class() -> type:
    """OneFlow's class of the message, without OneFlow, whose libraries are 1 GB."""
    package = importlib.util.find_spec("oneflow")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("OneFlow is not installed; see requirements.txt")
    path = os.path.join(os.path.dirname(package.origin), "core", "record", "record_pb2.py")
    return runpy.run_path(path)["OFRecord"]


OFRecord: Any = _message_class()


def encode_record(encoded: bytes, label: int, **more: bytes | str | int) -> bytes:
    """The serialised OFRecord of one image: equal arguments give equal bytes.

    Integers become an int32_list, the rest a bytes_list (text as UTF-8), of one value each.
    Raises ValueError for a label below 0 and integers outside int32.
    """
    if label < 0:
        raise ValueError(f"label {label} is below 0")
    record = OFRecord()
    for name, value in {"encoded": encoded, "class/label": label, **more}.items():
        if isinstance(value, int):
            record.feature[name].int32_list.value.append(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            record.feature[name].bytes_list.value.append(value)
    return record.SerializeToString(deterministic=True)


def decode_record(data: bytes) -> OFRecord:
    """The OFRecord that `data` is. Raises ValueError, with the reason, where it is not one."""
    record = OFRecord()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            record.ParseFromString(data)
    except DecodeError:
        raise ValueError("protobuf cannot parse it") from None
    if caught:  # protobuf's warning of bytes left over, on which OneFlow ends the process
        raise ValueError("it ends before its last byte")
    return record


def only_value(record: OFRecord, name: str, kind: str) -> Any:
    """The only value of a feature of one kind, `int32` or `bytes`. Raises ValueError."""
    if name not in record.feature:
        raise ValueError(f"has no `{name}`")
    found = record.feature[name].WhichOneof("kind")
    values = getattr(record.feature[name], found).value if found else []
    if found != f"{kind}_list" or len(values) != 1:
        what = f"{len(values)} values of {found.removesuffix('_list')}" if found else "nothing"
        raise ValueError(f"`{name}` holds {what}, not one of {kind}")
    return values[0]


# Parts.


def part_name(number: int) -> str:
    return f"{PART_PREFIX}{number:05d}"


def part_names(directory: str | os.PathLike) -> list[str]:
    """The parts in a directory, in the order of their numbers. Raises OSError."""
    matches = filter(None, map(PART_NAME.fullmatch, os.listdir(directory)))
    return [match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[0]))]


def missing_part(names: list[str]) -> str | None:
    """The first gap in the numbers of parts, which go up from 0, as many digits each as the first.

    OneFlow's reader opens parts by number.
    """
    width = len(names[0]) - len(PART_PREFIX) if names else 1
    wanted = (f"{PART_PREFIX}{number:0{width}d}" for number in range(len(names)))
    return next((want for name, want in zip(names, wanted, strict=True) if name != want), None)


def count_records(path: str) -> int:
    """Number of records of one part, found by walking its length fields.

    A part is a sequence of (int64 little-endian length, message of that length).

    Raises RunError, with record number and byte offset, where the file ends within a record or a
    length is impossible.
    """
    try:
        with open_input(path, buffering=0) as file:
            return len(walk_records(file.fileno(), path))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def walk_records(fd: int, path: str) -> list[int]:
    """Where each record of an open part begins. Raises OSError, and as `count_records`."""
    size = os.fstat(fd).st_size
    offsets: list[int] = []
    offset = 0
    while offset < size:
        where = f"{path}: record {len(offsets)}, at byte {offset},"
        cut_off = RunError(
            f"{where} is cut off at byte {size}, the end of the file; copy the part again, or make "
            "it again"
        )
        field = os.pread(fd, LENGTH.size, offset)
        if len(field) < LENGTH.size:
            raise cut_off
        (length,) = LENGTH.unpack(field)
        if not 0 < length < MAX_RECORD_BYTES:
            raise RunError(
                f"{where} claims a length of {length} bytes: the part is damaged or is not an "
                "OFRecord file; copy it again, or make it again"
            )
        offsets.append(offset)
        offset += LENGTH.size + length
        if offset > size:
            raise cut_off
    return offsets


# Manifest.

# What readers need of it; verify_ofrecord.py finds where it contradicts itself.
MANIFEST_SCHEMA = record(
    {
        "parts": listed(
            record(
                {"name": string, "num_examples": integer(0), "num_bytes": integer(0)},
                others=anything,
            ),
            low=1,
        ),
    },
    {
        "num_examples": integer(0),
        "num_classes": optional(integer(0, MAX_CLASSES)),
        "classes": optional(listed(string, high=MAX_CLASSES)),
    },
    others=anything,
)


def read_manifest(directory: str | os.PathLike) -> dict | None:
    """The manifest of an OFRecord directory, or None where it has none.

    Raises RunError where the file is not a manifest as `write_manifest` writes it.
    """
    path = os.path.join(directory, MANIFEST)
    try:
        manifest = read_json(path)
        MANIFEST_SCHEMA(manifest, "")
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(
            f"{path} is not a manifest that can be read ({reason}); remove it to have the parts "
            "counted, or make the data set again"
        ) from None
    return manifest


def write_manifest(
    directory: Path, *, parts: list[dict], classes: Sequence[str], made_by: dict
) -> None:
    """Write manifest.json, by which a directory is known to be whole; so write it last."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_examples": sum(part["num_examples"] for part in parts),
        "num_classes": len(classes),
        "classes": list(classes),
        "parts": parts,
        "made_by": made_by,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_whole(directory / MANIFEST, text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there with all of `data` or, whatever happens, as it was before."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
