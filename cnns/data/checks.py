"""Checks of OFRecord directories: the native reader aborts the process on any fault in them."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

from cnns.data.format import (
    LENGTH,
    PART_PREFIX,
    count_records,
    decode_record,
    missing_part,
    only_value,
    part_name,
    part_names,
    read_manifest,
)
from cnns.data.images import IMAGE_SUFFIXES, BadImage, TooLarge, open_image
from cnns.data.jpeg import walk_jpeg
from cnns.data.kinds import Shards
from cnns.errors import RunError, UsageError
from cnns.hints import path_hint
from cnns.inputs import check_ordinary, kind_of, open_input
from cnns.log import notice

# Walking length fields costs microseconds a record from a warm cache, a seek from a cold disk. Up
# to this many records it is done although a manifest vouches for the parts.
ALWAYS_WALK = 200_000
# Looking into records reads them whole. Up to this size every record is looked into.
ALWAYS_LOOK_BYTES = 256 << 20
DAMAGED_SHOWN = 5  # records with a damaged JPEG that are named
WALKING_THREADS = 16  # parts are walked side by side, for storage with a long latency


def check_shards(directory: str, *, flag: str, part_num: int | None = None) -> Shards:
    """Check the OFRecord parts of `directory` and count their records.

    With a manifest, parts are compared with it, and the record framing is walked as well unless
    there are more than ALWAYS_WALK records. Without one the framing is always walked, and the
    records are looked into: all of them up to ALWAYS_LOOK_BYTES, else the first of each part.

    Args:
        flag: the flag that named the directory, for messages.
        part_num: number of parts to use, from the first; all if None.

    Raises:
        UsageError: the directory or a part is missing, or `part_num` is more than there is.
        RunError: a part or the manifest is damaged, or a part is of another kind.
    """
    names, suffix_length = list_parts(directory, flag=flag)
    manifest = read_manifest(directory)
    if manifest is not None:
        compare_names(names, manifest, directory=directory, flag=flag)
    if part_num is not None:
        if part_num > len(names):
            raise UsageError(
                f"{part_num_flag(flag)}={part_num}, but {directory} holds {len(names)}; give at "
                "most that, or leave the flag out"
            )
        names = names[:part_num]
    paths = [os.path.join(directory, name) for name in names]
    for path in paths:
        try:
            check_ordinary(path)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None
    max_label = None
    if manifest is None:
        counts = count_all_records(paths)
        max_label = look_into_records(paths)
    else:
        counts = compare_parts(paths, manifest["parts"])
    for path, count in zip(paths, counts, strict=True):
        if count == 0:
            raise RunError(f"{path} holds no records, and OneFlow's reader cannot open such a part")
    held = manifest or {}
    return Shards(
        path=directory,
        suffix_length=suffix_length,
        part_counts=tuple(counts),
        num_examples=sum(counts),
        num_classes=held.get("num_classes"),
        classes=tuple(held.get("classes") or ()) or None,
        max_label=max_label,
        source=str((held.get("made_by") or {}).get("source", "")),
    )


def compare_names(names: list[str], manifest: dict, *, directory: str, flag: str) -> None:
    """Raise unless the parts in a directory are those of its manifest, in order."""
    listed = [part["name"] for part in manifest["parts"]]
    for name in listed:
        if name not in names:
            raise UsageError(
                f"{flag}: {os.path.join(directory, name)} is missing; its manifest lists "
                f"{len(listed)} parts: copy it again, or make the data set again"
            )
    if listed != names:
        raise RunError(
            f"{directory} holds parts {names[0]} to {names[-1]}, and its manifest lists "
            f"{', '.join(listed[:3])}{', ...' if len(listed) > 3 else ''}; make the data set again"
        )


def compare_parts(paths: list[str], entries: list[dict]) -> list[int]:
    """Records of each part, as its manifest says. Raises RunError where a part differs from it."""
    counts = [entry["num_examples"] for entry in entries[: len(paths)]]
    for path, entry in zip(paths, entries, strict=False):
        size = os.path.getsize(path)
        if size != entry["num_bytes"]:
            raise RunError(
                f"{path} has {size} bytes and its manifest says {entry['num_bytes']}: it was cut "
                "off or changed; copy it again, or make the data set again"
            )
    if sum(counts) <= ALWAYS_WALK:
        for path, walked, count in zip(paths, count_all_records(paths), counts, strict=True):
            if walked != count:
                raise RunError(
                    f"{path} holds {walked} records and its manifest says {count}; make the data "
                    "set again"
                )
    return counts


def count_all_records(paths: list[str]) -> list[int]:
    with ThreadPoolExecutor(WALKING_THREADS) as pool:
        return list(pool.map(count_records, paths))


def part_num_flag(data_dir_flag: str) -> str:
    return data_dir_flag.replace("_dir", "_part_num")


def describe_parent(directory: str, flag: str) -> str:
    """What to do about a directory that is not there, such as the train/ of what is not split."""
    parent = os.path.dirname(os.path.normpath(directory))
    with suppress(OSError):
        if part_names(parent or "."):
            return (
                f"{parent} holds parts that are not split into train/ and validation/: make them "
                "again with --val_split=0.1 (tools/make_ofrecord.py folder)"
            )
        with os.scandir(parent or ".") as entries:
            if parent and any(is_image_folder(entry) for entry in entries):
                return (
                    f"{parent} is not split into train/ and validation/: {flag}={parent} "
                    "--val_split=0.1 splits it"
                )
    tools = "tools/make_ofrecord.py or tools/make_mini_imagenet.py"
    return path_hint(directory, f"check the path, or make a data set with {tools}")


def is_image_folder(entry: os.DirEntry) -> bool:
    with os.scandir(entry.path) if entry.is_dir() else nullcontext(()) as held:
        return any(each.name.lower().endswith(IMAGE_SUFFIXES) for each in held)


def list_parts(directory: str, *, flag: str) -> tuple[list[str], int]:
    """Names of the parts in `directory`, in order, and the number of digits they are padded to.

    Raises UsageError where there is no such directory, no part, or a gap in their numbers.
    """
    if not os.path.isdir(directory):
        if os.path.exists(directory):
            raise UsageError(
                f"{flag}: {directory} is {kind_of(directory)}, and a directory of parts is needed"
            )
        raise UsageError(
            f"{flag}: there is no directory {directory}; {describe_parent(directory, flag)}"
        )
    try:
        names = part_names(directory)
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {directory}: {error.strerror}") from None
    if not names:
        raise UsageError(
            f"{flag}: {directory} holds no OFRecord parts ({part_name(0)}, ...), and no folders of "
            "images, one per class; tools/make_ofrecord.py makes parts"
        )
    missing = missing_part(names)
    if missing:
        raise UsageError(
            f"{flag}: {os.path.join(directory, missing)} is missing; parts must be numbered from 0 "
            "without a gap"
        )
    width = len(names[0]) - len(PART_PREFIX)
    return names, width if width > 1 else -1


def look_into_records(paths: list[str]) -> int | None:
    """See that records are what the loaders read: one JPEG in RGB, and one label.

    What OneFlow's decoders meet instead ends the process, or, if it is a greyscale JPEG, is decoded
    to noise without a word. Data that tools/make_ofrecord.py made need no such look.

    A JPEG that is cut off is decoded in part, and libjpeg says so, but not in which record: such
    records are named here. Returns the largest label where every record was looked at, else None.
    Raises RunError, with part, record and byte.
    """
    every = sum(map(os.path.getsize, paths)) <= ALWAYS_LOOK_BYTES
    max_label, damaged = None, []
    for path in paths:
        with open_input(path) as file:
            number = 0
            while (every or number == 0) and (field := file.read(LENGTH.size)):
                where = f"{path}: record {number}, at byte {file.tell() - LENGTH.size},"
                label, damage = look_into_record(file.read(*LENGTH.unpack(field)), where)
                if damage:
                    damaged.append(f"{where} holds a damaged JPEG: {damage}")
                max_label = label if max_label is None else max(label, max_label)
                number += 1
    for line in damaged[:DAMAGED_SHOWN]:
        notice(line)
    if len(damaged) > DAMAGED_SHOWN:
        more = len(damaged) - DAMAGED_SHOWN
        notice(f"{more} more records hold a damaged JPEG; tools/verify_ofrecord.py lists them")
    return max_label if every else None


def look_into_record(data: bytes, where: str) -> tuple[int, str]:
    """The label of one serialised record, and what is wrong with its JPEG, if anything.

    Raises RunError, with `where`, if it cannot be read.
    """
    try:
        message = decode_record(data)
        encoded = only_value(message, "encoded", "bytes")
        label = only_value(message, "class/label", "int32")
    except ValueError:
        raise RunError(
            f"{where} is not an OFRecord with one `encoded` image and one int32 `class/label`; "
            "make the data set with tools/make_ofrecord.py"
        ) from None
    kind, damage = "no image", ""
    try:
        with open_image(encoded) as image:
            kind = f"{image.mode} {image.format}"
        walk_jpeg(encoded)
    except TooLarge as error:
        raise RunError(f"{where} holds {error}; make the data set again without it") from None
    except BadImage as error:
        damage = str(error)
    if kind not in ("RGB JPEG", "RGB MPO"):
        raise RunError(
            f"{where} holds {kind}, and OneFlow's decoder reads RGB JPEG only; make the data set "
            "with tools/make_ofrecord.py, which converts"
        )
    return label, damage
