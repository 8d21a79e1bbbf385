"""Directories of OFRecord parts: equal input and seed give equal bytes, and what is there is whole.

A part is a sequence of (int64 little-endian length, serialised OFRecord message). A directory is
filled under the name `<directory>.partial` and takes its own name only when every part and, last,
`manifest.json` are on disk; so a run that was killed leaves nothing that a reader would take for
data. A part depends on its own entries alone, not on the parts before it, so that parts can be
written in any order and by any process.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from config import RunError, UsageError
from file_util import sync_directory, write_durably

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
LENGTH = struct.Struct("<q")
WORDNET_LINE = re.compile(r"(n\d{8})\s+(\S.*)")


class BadImage(Exception):
    """An example that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Example:
    """One record to be. `more` holds further features, as `encode_example` takes them."""

    encoded: bytes  # an RGB JPEG
    label: int  # 0-based
    change: str = ""  # what the source was, where `encoded` is not the source's own bytes
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """One directory to be made: the names of its examples, for messages, and how to get each one.

    `load(i)` returns the Example called `names[i]` or raises BadImage. It is called once for each
    i, in no particular order, and must give the same bytes every time.
    """

    output: Path
    names: Sequence[str]
    load: Callable[[int], Example]


@dataclass
class PartReport:
    info: dict  # the part's entry in the manifest
    bad: list[tuple[str, str]]  # (name, reason)
    changes: Counter  # what the source was -> number of examples


@functools.lru_cache(maxsize=1)
def record_class():
    """OneFlow's message class; imported on demand, since that loads the native library."""
    import oneflow_setup  # noqa: F401

    from oneflow.core.record.record_pb2 import OFRecord

    return OFRecord


def encode_example(encoded: bytes, label: int, **more) -> bytes:
    """The serialised OFRecord of one image: the same arguments give the same bytes.

    `encoded` becomes a bytes_list, `label` (0-based) an int32_list named `class/label`. Each of
    `more` is bytes, str (stored as UTF-8), int (int32) or float (float32), or a list of one kind.
    Raises TypeError for other kinds and ValueError for integers outside int32 or a label below 0.
    """
    if label < 0:
        raise ValueError(f"label {label} is below 0")
    record = record_class()()
    record.feature["encoded"].bytes_list.value.append(encoded)
    record.feature["class/label"].int32_list.value.append(label)
    for name, value in more.items():
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(v, (bytes, str)) for v in values):
            values = [v.encode() if isinstance(v, str) else v for v in values]
            record.feature[name].bytes_list.value.extend(values)
        elif all(isinstance(v, int) for v in values):
            record.feature[name].int32_list.value.extend(values)
        elif all(isinstance(v, (int, float)) for v in values):
            record.feature[name].float_list.value.extend(values)
        else:
            raise TypeError(f"feature {name}: {value!r} is neither bytes, str, int nor float")
    # Features are a protobuf map, whose order is free unless asked for.
    return record.SerializeToString(deterministic=True)


def encode_jpeg(image: Image.Image, **options) -> bytes:
    """An RGB JPEG of `image`, quality 95 and full colour resolution unless `options` say else."""
    buffer = io.BytesIO()
    if "qtables" not in options:
        options.setdefault("quality", 95)
    image.convert("RGB").save(buffer, "JPEG", **{"subsampling": 0, "optimize": True, **options})
    return buffer.getvalue()


def part_name(index: int) -> str:
    return f"part-{index:05d}"


class PartWriter:
    """Writes one part under a temporary name; leaving the `with` block in peace renames it.

    After that `info` is the part's entry in the manifest. Left by an exception, the block removes
    the temporary file and makes no part. Raises OSError where the disk does.
    """

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self.num_examples = 0
        self.num_bytes = 0
        self.digest = hashlib.sha256()
        self.info = None

    def __enter__(self) -> "PartWriter":
        self.file = open(self.temporary, "wb", buffering=1 << 20)
        return self

    def write(self, message: bytes) -> None:
        """Append one serialised OFRecord."""
        for piece in (LENGTH.pack(len(message)), message):
            self.file.write(piece)
            self.digest.update(piece)
            self.num_bytes += len(piece)
        self.num_examples += 1

    def __exit__(self, kind, error, traceback) -> None:
        try:
            with self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.temporary, self.path)
                self.info = {
                    "name": self.path.name,
                    "num_examples": self.num_examples,
                    "num_bytes": self.num_bytes,
                    "sha256": self.digest.hexdigest(),
                }
        finally:
            self.temporary.unlink(missing_ok=True)


def write_manifest(directory: Path, *, parts: list[dict], classes: list[str], made_by: dict):
    """Write manifest.json, by which a directory is known to be whole; so write it last."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_examples": sum(part["num_examples"] for part in parts),
        "num_classes": len(classes),
        "classes": list(classes),
        "parts": parts,
        "made_by": made_by,
    }
    temporary = directory / (MANIFEST + ".tmp")
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_durably(temporary, text.encode())
    os.replace(temporary, directory / MANIFEST)
    sync_directory(directory)


def partial_name(output: Path) -> Path:
    """Where `output` is filled: beside it, or beside the directory that it is a link to."""
    place = output.resolve()
    return place.with_name(place.name + ".partial")


def check_output(output: Path) -> None:
    """Raise UsageError unless a directory named `output` can be made without touching a file."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; --output needs a new or an empty directory")
    if os.path.ismount(output):
        raise UsageError(
            f"{output}: is a mount point, which cannot be filled under another name first; "
            f"give a folder in it, such as --output={output / 'ofrecord'}"
        )
    found = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UsageError(
            f"{output}: already holds {found[0]}{more}, and nothing is deleted or mixed; "
            "remove it, or give another --output"
        )
    partial = partial_name(output)
    if partial.exists():
        raise UsageError(
            f"{partial}: left by a run that was killed, or one is writing it now; "
            "remove it, or give another --output"
        )


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `output` at the end, or is gone after an exception."""
    partial = partial_name(output)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()  # fails if another run was faster, so what is removed below is our own
    try:
        yield partial
        # Takes the place of an empty directory, of no other.
        os.rename(partial, output.resolve())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(partial.parent)


def default_num_parts(num_examples: int) -> int:
    """One part per started 10,000 examples; 8 at least, so that 8 devices find one each.

    Parts of fewer than 64 examples are not worth their name, so small data make fewer.
    """
    return max(-(-num_examples // 10_000), min(8, num_examples // 64), 1)


def shuffled_parts(num_examples: int, num_parts: int, seed: int) -> list[list[int]]:
    """Positions of the examples of each part: a shuffle, cut into runs that differ by 1 at most."""
    order = list(range(num_examples))
    random.Random(seed).shuffle(order)  # Python keeps this sequence from version to version
    bounds = [k * num_examples // num_parts for k in range(num_parts + 1)]
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def write_part(
    path: Path, split: Split, positions: Sequence[int], advance: Callable[[], object]
) -> PartReport:
    """Write the examples at `positions` of `split`, in that order, leaving bad ones out."""
    bad, changes = [], Counter()
    with PartWriter(path) as part:
        for i in positions:
            try:
                example = split.load(i)
            except BadImage as error:
                bad.append((split.names[i], str(error)))
            else:
                part.write(encode_example(example.encoded, example.label, **example.more))
                if example.change:
                    changes[example.change] += 1
            advance()
    return PartReport(part.info, bad, changes)


def write_split(
    directory: Path, split: Split, *, num_parts: int, seed: int, advance: Callable[[], object]
) -> list[PartReport]:
    parts = shuffled_parts(len(split.names), num_parts, seed)
    return [
        write_part(directory / part_name(k), split, positions, advance)
        for k, positions in enumerate(parts)
    ]


def refuse_bad_images(reports: dict[Path, list[PartReport]], num_examples: int, skip_bad: bool):
    """Name every bad image on stderr; raise RunError unless the good ones may do without them."""
    bad = [item for parts in reports.values() for part in parts for item in part.bad]
    for name, reason in sorted(bad):
        print(f"bad image: {name}: {reason}", file=sys.stderr)
    if bad and not skip_bad:
        raise RunError(
            f"{len(bad)} of {num_examples} images are bad (listed above); nothing was written: "
            "mend or remove them, or leave them out with --skip_bad"
        )
    for output, parts in reports.items():
        empty = [part.info["name"] for part in parts if part.info["num_examples"] == 0]
        if empty:
            raise RunError(
                f"{output}/{empty[0]}: would be empty, as all its images are bad (listed above); "
                "give fewer --num_parts, or mend the images"
            )


def write_dataset(
    splits: Sequence[Split],
    *,
    classes: Sequence[str],
    made_by: dict,
    num_parts: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> None:
    """Write every split, or none of them, and say on stdout what was made.

    `classes[label]` is the name of a class; `made_by` goes into the manifests. Images are read
    when they are written, so memory holds the names only.
    Raises UsageError where an output is taken or there are more parts than examples, RunError for
    bad images (unless `skip_bad`) and for a disk that refuses.
    """
    for split in splits:
        if num_parts and num_parts > len(split.names):
            raise UsageError(
                f"--num_parts={num_parts}: {split.output} has {len(split.names)} examples, "
                "and a part needs one at least"
            )
    num_examples = sum(len(split.names) for split in splits)
    reports = {}
    record_class()  # a signal in the middle of this import would get lost in it
    try:
        for split in splits:
            check_output(split.output)
        with contextlib.ExitStack() as stack:
            directories = [stack.enter_context(new_directory(split.output)) for split in splits]
            # disable=None: on a terminal only
            bar = stack.enter_context(tqdm(total=num_examples, unit="image", disable=None))
            for split, directory in zip(splits, directories, strict=True):
                reports[split.output] = write_split(
                    directory,
                    split,
                    num_parts=num_parts or default_num_parts(len(split.names)),
                    seed=seed,
                    advance=bar.update,
                )
            bar.close()
            refuse_bad_images(reports, num_examples, skip_bad)
            for split, directory in zip(splits, directories, strict=True):
                finish_split(directory, reports[split.output], classes, made_by)
    except OSError as error:
        where = error.filename or splits[0].output
        raise RunError(f"{where}: cannot write: {error.strerror or error}") from None
    for split in splits:
        print_summary(split.output, reports[split.output], len(classes))


def finish_split(directory: Path, parts: list[PartReport], classes, made_by: dict) -> None:
    bad = sorted(item for part in parts for item in part.bad)
    changes = sum((part.changes for part in parts), Counter())
    if changes:
        made_by = {**made_by, "re_encoded": dict(sorted(changes.items()))}
    if bad:
        made_by = {**made_by, "left_out": [{"file": name, "reason": why} for name, why in bad]}
    write_manifest(directory, parts=[part.info for part in parts], classes=classes, made_by=made_by)


def print_summary(output: Path, parts: list[PartReport], num_classes: int) -> None:
    num_examples, num_bytes = (
        sum(part.info[key] for part in parts) for key in ("num_examples", "num_bytes")
    )
    print(
        f"{output}: {num_examples} examples of {num_classes} classes in {len(parts)} "
        f"part{'s' if len(parts) > 1 else ''}, {num_bytes} bytes"
    )
    changes = sum((part.changes for part in parts), Counter())
    if changes:
        kinds = ", ".join(f"{count} {what}" for what, count in sorted(changes.items()))
        print(f"{output}: encoded as RGB JPEG: {kinds}")
    num_bad = sum(len(part.bad) for part in parts)
    if num_bad:
        print(f"{output}: bad images left out, as listed in {MANIFEST}: {num_bad}")


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """Read a class list, one class a line: a name, or a WordNet id and a name.

    Returns the names and the WordNet ids (empty if the file has none), index = label.
    Raises UsageError for a file that is missing, empty, mixed or has one class twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise UsageError(f"{path}: cannot read the class list: {reason}") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UsageError(f"{path}: is empty; a class list needs one class a line")
    matches = [WORDNET_LINE.fullmatch(line) for line in lines]
    with_ids = any(matches)
    seen = {}
    for number, (line, match) in enumerate(zip(lines, matches, strict=True), start=1):
        if not line:
            raise UsageError(f"{path}: line {number} is empty; a class list has no gaps")
        if with_ids and not match:
            raise UsageError(
                f"{path}: line {number} ({line!r}) has no WordNet id, but other lines have"
            )
        key = match[1] if match else line
        if key in seen:
            raise UsageError(f"{path}: {key!r} stands in line {seen[key]} and line {number}")
        seen[key] = number
    if with_ids:
        return [match[2] for match in matches], [match[1] for match in matches]
    return lines, []
