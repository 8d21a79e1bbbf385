"""Check OFRecord directories, of this toolkit or of others, and list every fault.

python3 tools/verify_ofrecord.py data/imagenet/ofrecord
python3 tools/verify_ofrecord.py --num_workers=8 data/photos/train data/photos/validation
python3 tools/verify_ofrecord.py --decode --num_classes=1000 /data/others/train
"""

import contextlib
import functools
import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.environment  # noqa: F401  (first, see there)

from cnns.convert.jpegs import add_max_pixels, decode_jpeg
from cnns.convert.pool import Advance, Progress, run_tasks
from cnns.convert.writer import BLOCK_BYTES, default_num_workers
from cnns.data.format import (
    LENGTH,
    MANIFEST,
    MAX_CLASSES,
    MAX_RECORD_BYTES,
    OFRecord,
    decode_record,
    missing_part,
    only_value,
    part_name,
    part_names,
    read_manifest,
)
from cnns.data.images import BadImage
from cnns.data.jpeg import walk_jpeg
from cnns.errors import RunError, UsageError, printable, run_main
from cnns.flags.parser import Parser, add_switch
from cnns.flags.values import number
from cnns.hints import path_hint
from cnns.inputs import open_input
from cnns.interrupts import exit_on_signals

OPTIONS = ("num_classes", "decode", "max_pixels", "num_workers")  # flags
SPLITS = ("train", "validation")
BYTES_PER_IMAGE = 100_000  # or so, to estimate the work
# What OneFlow 0.9's decoders do with an image that is not an RGB JPEG.
CONSEQUENCE = {
    "greyscale JPEG": "which OneFlow decodes to noise without an error",
    "not a JPEG": "and OneFlow's decoder reads nothing else",
}
OTHER_CONSEQUENCE = "on which OneFlow's decoder fails"


@dataclass(frozen=True)
class Look:
    """How records are looked at."""

    num_classes: int
    decode: bool
    max_pixels: int


@dataclass
class PartResult:
    faults: list[str] = field(default_factory=list)
    num_examples: int = 0
    num_bytes: int = 0
    max_label: int = -1


# One record.


def image_faults(encoded: bytes, record: OFRecord, look: Look) -> Iterator[str]:
    try:
        info = walk_jpeg(encoded, max_pixels=look.max_pixels)
        if look.decode:
            decode_jpeg(encoded, max_pixels=look.max_pixels)
    except BadImage as error:
        reason = str(error)
        yield f"the image: {', '.join(filter(None, (reason, CONSEQUENCE.get(reason))))}"
        return
    if info.oddity:
        yield f"the image: {info.oddity}, {CONSEQUENCE.get(info.oddity, OTHER_CONSEQUENCE)}"
    for name in ("height", "width", "channels"):
        values = list(record.feature[name].int32_list.value)
        if values and values != [getattr(info, name)]:
            yield f"`{name}` is {values}, and the image has {getattr(info, name)}"


def record_faults(message: bytes, look: Look) -> tuple[list[str], int]:
    """What is wrong with one serialised record, and its label (-1 where there is none)."""
    found, label = [], -1
    try:
        record = decode_record(message)
    except ValueError as error:
        return [f"is not an OFRecord: {error}"], label
    size = record.ByteSize()
    record.DiscardUnknownFields()
    if record.ByteSize() != size:
        found.append("is not an OFRecord: it has other fields as well")
    try:
        label = only_value(record, "class/label", "int32")
        if not 0 <= label < look.num_classes:
            found.append(f"label {label} is outside of 0 to {look.num_classes - 1}")
    except ValueError as error:
        found.append(str(error))
    try:
        encoded = only_value(record, "encoded", "bytes")
        found += image_faults(encoded, record, look)
    except ValueError as error:
        found.append(str(error))
    return found, label


# One part.


def check_part(path: Path, entry: dict, look: Look, advance: Advance) -> PartResult:
    """Walk one part, all of it, once. `entry` is the manifest's; empty where there is none."""
    result = PartResult()
    try:
        with open_input(path, buffering=BLOCK_BYTES) as file:
            digest = walk_part(file, result, look, advance)
    except OSError as error:
        return PartResult([f"{path.name}: cannot be read: {error.strerror}"])
    found = []
    if not result.num_bytes:
        found.append("holds no record, and OneFlow's reader cannot open that")
    for key, what in (("num_bytes", "bytes"), ("num_examples", "complete records")):
        count = getattr(result, key)
        if entry.get(key, count) != count:
            found.append(f"holds {count} {what}, and the manifest says {entry[key]}")
    if entry.get("sha256", digest) != digest:
        found.append("its SHA-256 differs from the manifest's: it was changed")
    result.faults += [f"{path.name}: {what}" for what in found]
    return result


def walk_part(file: BinaryIO, result: PartResult, look: Look, advance: Advance) -> str:
    """Fill in the result; return the SHA-256 of the part."""
    at, digest = 0, hashlib.sha256()
    size = result.num_bytes = os.fstat(file.fileno()).st_size
    while at < size:
        where = f"{os.path.basename(file.name)}: record {result.num_examples}, at byte {at}"
        head = file.read(LENGTH.size)
        digest.update(head)
        left = size - at - LENGTH.size
        if left < 0:
            what = f"its length field is cut off at byte {size}, the end of the file"
            result.faults.append(f"{where}: {what}")
            break
        (length,) = LENGTH.unpack(head)
        if not 0 < length <= min(left, MAX_RECORD_BYTES):
            result.faults.append(
                f"{where}: its length field says {length}, and {left} bytes follow: it is damaged, "
                "or the part is cut off; what follows in this part was not looked at"
            )
            break
        message = file.read(length)
        digest.update(message)
        found, label = record_faults(message, look)
        result.faults += [f"{where}: {what}" for what in found]
        result.max_label = max(result.max_label, label)
        result.num_examples += 1
        at += LENGTH.size + length
        advance(LENGTH.size + length)
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


# One directory.


def manifest_faults(manifest: dict) -> Iterator[str]:
    """Where a manifest contradicts itself."""
    total = sum(part["num_examples"] for part in manifest["parts"])
    if manifest.get("num_examples", total) != total:
        yield f"{MANIFEST}: num_examples is {manifest['num_examples']}, its parts have {total}"
    named = len(manifest.get("classes") or ())
    if named and manifest.get("num_classes", named) != named:
        yield f"{MANIFEST}: num_classes is {manifest['num_classes']}, {named} are named"


def name_faults(names: list[str], manifest: dict | None) -> Iterator[str]:
    """Parts that are missing or not listed."""
    if manifest is None:
        if missing := missing_part(names):
            yield f"{missing}: is missing; parts are numbered from 0 without a gap"
        return
    listed = [part["name"] for part in manifest["parts"]]
    for name in listed:
        if name not in names:
            yield f"{name}: is missing; the manifest lists it"
    for name in names:
        if name not in listed:
            yield f"{name}: is not in the manifest"


def list_parts(directory: Path) -> list[str]:
    try:
        return part_names(directory)
    except OSError as error:
        raise UsageError(f"{directory}: cannot be read: {error.strerror}") from None


def find_directories(paths: list[Path]) -> list[Path]:
    """The directories of parts that the arguments name. Raises UsageError."""
    found = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path}: there is no such directory; {path_hint(path)}")
        if list_parts(path) or (path / MANIFEST).exists():
            found.append(path)
            continue
        below = [path / split for split in SPLITS if (path / split).is_dir()]
        below = [directory for directory in below if list_parts(directory)]
        if not below:
            raise UsageError(f"{path}: holds no OFRecord parts ({part_name(0)}, ...)")
        found += below
    return found


def verify(
    directory: Path,
    *,
    num_classes: int | None,
    decode: bool,
    max_pixels: int,
    num_workers: int | None,
) -> int:
    """Print every fault of a directory as it is found, and a summary; return their number."""
    names = list_parts(directory)
    try:
        manifest = read_manifest(directory)
        faults = list(manifest_faults(manifest)) if manifest else []
    except RunError:
        manifest, faults = None, [f"{MANIFEST}: is not a manifest that can be read"]
    faults += name_faults(names, manifest)
    for fault in faults:
        print(printable(f"{directory}: {fault}"))
    manifest = manifest or {"parts": []}
    entries = {part["name"]: part for part in manifest["parts"]}
    num_classes = num_classes or manifest.get("num_classes") or MAX_CLASSES
    look = Look(num_classes, decode, max_pixels)
    checks = [
        functools.partial(check_part, directory / name, entries.get(name, {}), look)
        for name in names
    ]
    size = sum(os.path.getsize(directory / name) for name in names)
    num_workers = num_workers or default_num_workers(size // BYTES_PER_IMAGE)
    num_examples = num_faults = 0
    max_label = -1
    with Progress(size, unit="bytes") as progress:
        tasks = run_tasks(checks, num_workers=num_workers, advance=progress.advance)
        with contextlib.closing(tasks):  # ends the workers whatever happens here
            for _, result in tasks:
                for fault in result.faults:
                    progress.print(printable(f"{directory}: {fault}"))
                num_faults += len(result.faults)
                num_examples += result.num_examples
                max_label = max(max_label, result.max_label)
    num_faults += len(faults)
    checksums = any("sha256" in entry for entry in entries.values())
    print(
        f"{printable(str(directory))}: {num_examples} examples in {len(names)} "
        f"part{'s' * (len(names) != 1)}, "
        f"{size} bytes, labels up to {max_label}, "
        f"checksums {'compared' if checksums else 'not compared, as there is no manifest'}, "
        f"images {'decoded' if decode else 'walked'}: "
        f"{num_faults or 'no'} fault{'s' * (num_faults != 1)}",
        flush=True,
    )
    return num_faults


def make_parser() -> Parser:
    parser = Parser(
        "Check directories of OFRecord parts, without OneFlow: framing, messages, labels, images, "
        "and sizes and checksums where there is a manifest. Each fault is a line with part, record "
        "number (from 0) and byte; exit status 1 if there is one.",
        doc=__doc__,
        epilog="Read on: tools/README.md, docs/ofrecord.md.",
    )
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directory of parts, or one that holds train/ and validation/",
    )
    add_switch(parser, "--decode", "decode every JPEG as well as walking its structure")
    parser.add_argument(
        "--num_classes",
        type=number(int, 1, MAX_CLASSES),
        help="labels must be below; unless given, as in the manifest",
    )
    add_max_pixels(parser)
    parser.add_argument(
        "--num_workers", type=number(int, 1, 999), help="processes; unless given, one per core"
    )
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    argv = sys.argv[1:] if argv is None else argv
    # A switch with an optional value would take the directory after it for that value.
    return make_parser().parse_args(["--decode=True" if a == "--decode" else a for a in argv])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = {name: getattr(args, name) for name in OPTIONS}
    num_faults = sum(verify(path, **options) for path in find_directories(args.directories))
    if num_faults:
        raise RunError(f"{num_faults} fault{'s' if num_faults > 1 else ''}, listed above")


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
