"""Directories of OFRecord parts: equal input and seed give equal bytes, and what is there is whole.

A part is a sequence of (int64 little-endian length, serialised OFRecord message). A directory is
filled under the name `<directory>.partial` and takes its own name only when every part and, last,
`manifest.json` are on disk; so a run that was killed leaves nothing that a reader would take for
data. A part depends on its own entries alone, not on the parts before it, so parts are written by
several processes, and a run that was interrupted goes on: `journal.jsonl` in the partial directory
names the finished parts, their checksums, and a digest of the entries they were made of.
"""

import contextlib
import fcntl
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
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cnns.checkpoint.files import sync_directory, write_durably
from cnns.errors import RunError, UsageError
from tools import ofrecord_message
from tools.worker_pool import Advance, Progress, run_tasks

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
JOURNAL = "journal.jsonl"
LOCK_SECONDS = 1.0
TEMPORARY = ".tmp"  # end of the name of a file that is not whole
BLOCK_BYTES = 1 << 20
SEND_BYTES = 8 << 20  # between calls that have the disk begin to write
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
    i, in no particular order, and must give the same bytes every time. It may have two methods:
    `load.take(positions)` is a loader of these examples alone, which is what other processes get,
    and `load.fingerprint(i)` are bytes that change when the source of the i-th example changes.
    """

    output: Path
    names: Sequence[str]
    load: Callable[[int], Example]
    list_changes: bool = False  # name each example that is not its source's own bytes


@dataclass
class PartReport:
    info: dict  # the part's entry in the manifest
    bad: list[tuple[str, str]]  # (name, reason)
    changes: list[tuple[str, str]]  # (name, what the source was)
    source: str  # digest of the entries that the part was made of
    kept: bool = False  # made by an earlier run
    discarded: str = ""  # why the part of an earlier run was made anew

    def journal_line(self, index: int) -> str:
        entry = {"index": index, **asdict(self)}
        del entry["kept"], entry["discarded"]
        return json.dumps(entry) + "\n"


def encode_example(encoded: bytes, label: int, **more) -> bytes:
    """The serialised OFRecord of one image: the same arguments give the same bytes.

    `encoded` becomes a bytes_list, `label` (0-based) an int32_list named `class/label`; `more` as
    `ofrecord_message.encode` takes them.
    Raises TypeError for other kinds and ValueError for integers outside int32 or a label below 0.
    """
    if label < 0:
        raise ValueError(f"label {label} is below 0")
    return ofrecord_message.encode({"encoded": encoded, "class/label": label, **more})


def encode_jpeg(image: Image.Image, **options) -> bytes:
    """An RGB JPEG of `image`, quality 95 and full colour resolution unless `options` say else."""
    buffer = io.BytesIO()
    if "qtables" not in options:
        options.setdefault("quality", 95)
    image.convert("RGB").save(buffer, "JPEG", **{"subsampling": 0, "optimize": True, **options})
    return buffer.getvalue()


def file_stamp(path: str, label: int) -> bytes:
    """What shows that an image file, or its label, is another one than before."""
    try:
        state = os.stat(path)
    except OSError:
        return f"{label} missing".encode()
    return f"{label} {state.st_size} {state.st_mtime_ns}".encode()


def part_name(index: int) -> str:
    return f"part-{index:05d}"


class PartWriter:
    """Writes one part under a temporary name; leaving the `with` block in peace renames it.

    After that `info` is the part's entry in the manifest. Left by an exception, the block removes
    the temporary file and makes no part. Raises OSError where the disk does.
    """

    def __init__(self, path: Path):
        self.path = path
        # A worker that outlives its killed parent for a moment must not meet the next run.
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
        self.num_examples = 0
        self.num_bytes = 0
        self.sent = 0  # bytes that the disk was told of
        self.digest = hashlib.sha256()
        self.info = None

    def __enter__(self) -> "PartWriter":
        self.file = open(self.temporary, "wb", buffering=BLOCK_BYTES)
        return self

    def write(self, message: bytes) -> None:
        """Append one serialised OFRecord."""
        for piece in (LENGTH.pack(len(message)), message):
            self.file.write(piece)
            self.digest.update(piece)
            self.num_bytes += len(piece)
        self.num_examples += 1
        if self.num_bytes - self.sent > SEND_BYTES:
            # The disk begins now, and has little left when it is waited for; and what is on it
            # makes room in the page cache for the input.
            self.sent = self.num_bytes
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

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
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_whole(directory / MANIFEST, text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there with all of `data` or, whatever happens, as it was before."""
    temporary = path.with_name(path.name + TEMPORARY)
    write_durably(temporary, data)
    os.replace(temporary, path)
    sync_directory(path.parent)


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


# What is being made.


def read_journal(path: Path) -> tuple[dict, dict[int, PartReport]]:
    """What the journal of an unfinished directory was begun with, and its finished parts.

    The last line may be cut off, as the run may have been killed while it wrote that.
    """
    lines = path.read_bytes().split(b"\n")
    identity, finished = json.loads(lines[0]), {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            index = entry.pop("index")
            finished[index] = PartReport(**entry)
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return identity, finished


def differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, "--" if key == "arguments" else "")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, now it is {b}")
    return found


def refuse_other(partial: Path, before: dict, now: dict) -> None:
    """Raise UsageError where a directory was begun by another command."""
    found = differences(before, now)
    if found:
        raise UsageError(
            f"{partial}: begun by a run with other arguments ({'; '.join(found)}); give the same "
            "to go on with it, remove it to start anew, or give another --output"
        )


def identity_of(made_by: dict, classes: Sequence[str], num_parts: int) -> dict:
    """What has to be the same for two runs to make the same directory of the same input."""
    arguments = dict(made_by.get("arguments") or {})
    arguments.pop("skip_bad", None)  # decides about the end, not about a part
    digest = hashlib.sha256("\n".join(classes).encode()).hexdigest()
    identity = {
        "tool": made_by.get("tool"),
        "arguments": arguments,
        "classes": digest[:16],
        "number of parts": num_parts,
    }
    return json.loads(json.dumps(identity))  # as it is read back


def identity_of_manifest(path: Path) -> dict | None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return identity_of(manifest["made_by"], manifest["classes"], len(manifest["parts"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Unfinished:
    """`<output>.partial`, locked: new, or left by an interrupted run of the same command.

    Left by an exception, the `with` block keeps the finished parts, and removes the directory if
    there are none. `finish` gives it its name.
    """

    def __init__(self, output: Path, identity: dict):
        self.output, self.directory, self.identity = output, partial_name(output), identity
        self.finished: dict[int, PartReport] = {}
        self.complete = False  # only the name is missing

    def __enter__(self) -> "Unfinished":
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(exist_ok=True)
        self.handle = os.open(self.directory, os.O_RDONLY)
        try:
            self.lock()
            self.look()
            if not self.complete:
                self.begin()
        except BaseException:
            os.close(self.handle)
            raise
        return self

    def lock(self) -> None:
        """Raise UsageError while another run holds the directory.

        The workers of a run that was killed hold it for a moment longer, so that is waited for.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"{self.directory}: another run is writing it now; wait for it, or give "
                        "another --output"
                    ) from None
                time.sleep(0.02)
            except OSError:  # a file system without locks
                return

    def look(self) -> None:
        """Read what an earlier run left. Raises UsageError where that was no run of this kind."""
        names = sorted(os.listdir(self.directory))
        others = [name for name in names if not name.endswith(TEMPORARY)]
        if JOURNAL in others:
            try:
                before, self.finished = read_journal(self.directory / JOURNAL)
            except ValueError:
                raise UsageError(
                    f"{self.directory / JOURNAL}: cannot be read; remove {self.directory} to start "
                    "anew"
                ) from None
            refuse_other(self.directory, before, self.identity)
        elif MANIFEST in others:
            before = identity_of_manifest(self.directory / MANIFEST) or {}
            refuse_other(self.directory, before, self.identity)
            self.complete = True
        elif others:
            raise UsageError(
                f"{self.directory}: holds {others[0]} but no {JOURNAL}, so nothing is known about "
                "it; remove it, or give another --output"
            )

    def begin(self) -> None:
        for path in self.directory.glob("*" + TEMPORARY):
            path.unlink(missing_ok=True)
        text = json.dumps(self.identity) + "\n"
        text += "".join(report.journal_line(k) for k, report in self.finished.items())
        try:
            write_whole(self.directory / JOURNAL, text.encode())
        except BaseException:
            if not self.finished:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def record(self, index: int, report: PartReport) -> None:
        """Note a part that is on disk."""
        self.finished[index] = report
        with open(self.directory / JOURNAL, "ab") as file:
            file.write(report.journal_line(index).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give a directory with its manifest its name."""
        (self.directory / JOURNAL).unlink(missing_ok=True)
        # Takes the place of an empty directory, of no other.
        os.rename(self.directory, self.output.resolve())
        sync_directory(self.directory.parent)

    def discard(self) -> None:
        self.finished = {}

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None or self.complete or not self.directory.is_dir():
                return
            if not self.finished:
                shutil.rmtree(self.directory, ignore_errors=True)
                return
            for path in self.directory.glob("*" + TEMPORARY):
                path.unlink(missing_ok=True)
            number = self.identity["number of parts"]
            print(
                f"note: {self.directory}: {len(self.finished)} of {number} parts are finished and "
                "kept; the same command goes on from there",
                file=sys.stderr,
            )
        finally:
            os.close(self.handle)


def default_num_parts(num_examples: int) -> int:
    """One part per started 10,000 examples; 8 at least, so that 8 devices find one each.

    Parts of fewer than 64 examples are not worth their name, so small data make fewer.
    """
    return max(-(-num_examples // 10_000), min(8, num_examples // 64), 1)


def shuffled_parts(num_examples: int, num_parts: int, seed: int) -> list[np.ndarray]:
    """Positions of the examples of each part: a shuffle, cut into runs that differ by 1 at most."""
    order = list(range(num_examples))
    random.Random(seed).shuffle(order)  # Python keeps this sequence from version to version
    order = np.array(order, np.int64)
    bounds = [k * num_examples // num_parts for k in range(num_parts + 1)]
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Taken:
    """Some examples of a loader that has no `take`."""

    load: Callable[[int], Example]
    positions: Sequence[int]

    def __call__(self, i: int) -> Example:
        return self.load(self.positions[i])


@dataclass(frozen=True)
class PartTask:
    """One part to be made, or to be kept where an earlier run made it of the same entries."""

    path: Path
    names: list[str]
    load: Callable[[int], Example]
    earlier: PartReport | None = None

    def __call__(self, advance: Advance) -> PartReport:
        source, why = self.source_digest(), ""
        if self.earlier:
            why = self.why_not_kept(source)
            if not why:
                advance(len(self.names))
                self.earlier.kept = True
                return self.earlier
        report = write_part(self.path, self.names, self.load, advance)
        report.source, report.discarded = source, why
        return report

    def source_digest(self) -> str:
        fingerprint = getattr(self.load, "fingerprint", lambda i: b"")
        digest = hashlib.sha256()
        for i, name in enumerate(self.names):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + fingerprint(i))
        return digest.hexdigest()

    def why_not_kept(self, source: str) -> str:
        if source != self.earlier.source:
            return "the input has changed"
        size, digest = 0, hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
        except FileNotFoundError:
            return "it was missing"
        info = self.earlier.info
        same = (size, digest.hexdigest()) == (info["num_bytes"], info["sha256"])
        return "" if same else "it was damaged"


def write_part(
    path: Path, names: Sequence[str], load: Callable[[int], Example], advance: Advance
) -> PartReport:
    """Write all examples of a loader, in order, leaving bad ones out."""
    bad, changes = [], []
    with PartWriter(path) as part:
        for i, name in enumerate(names):
            try:
                example = load(i)
            except BadImage as error:
                bad.append((name, str(error)))
            else:
                part.write(encode_example(example.encoded, example.label, **example.more))
                if example.change:
                    changes.append((name, example.change))
            advance(1)
    return PartReport(part.info, bad, changes, source="")


def part_tasks(place: Unfinished, split: Split, seed: int, skip_bad: bool) -> Iterator[PartTask]:
    parts = shuffled_parts(len(split.names), place.identity["number of parts"], seed)
    for k, positions in enumerate(parts):
        take = getattr(split.load, "take", lambda positions: Taken(split.load, positions))
        earlier = place.finished.get(k)
        if earlier and earlier.bad and not skip_bad:
            earlier = None  # they may have been mended
        names = [split.names[i] for i in positions]
        yield PartTask(place.directory / part_name(k), names, take(positions), earlier)


def write_split(
    place: Unfinished,
    split: Split,
    *,
    seed: int,
    skip_bad: bool,
    num_workers: int,
    advance: Advance,
) -> list[PartReport]:
    """Make the parts that are missing; return the reports of all, in order."""
    reports, discarded, earlier = {}, Counter(), len(place.finished)
    tasks = part_tasks(place, split, seed, skip_bad)
    running = run_tasks(tasks, num_workers=num_workers, advance=advance)
    with contextlib.closing(running):  # ends the workers whatever happens here
        for k, report in running:
            reports[k] = report
            if report.discarded:
                discarded[report.discarded] += 1
            if not report.kept and (skip_bad or not report.bad):
                place.record(k, report)
    if earlier:
        kept = sum(report.kept for report in reports.values())
        anew = "".join(f"; {n} made anew, as {why}" for why, n in sorted(discarded.items()))
        print(
            f"note: {place.output}: {kept} parts of {len(reports)} were there from an earlier "
            f"run{anew}",
            file=sys.stderr,
        )
    return [reports[k] for k in sorted(reports)]


def refuse_bad_images(
    reports: dict[Path, list[PartReport]],
    places: Sequence[Unfinished],
    num_examples: int,
    skip_bad: bool,
):
    """Name every bad image on stderr; raise RunError unless the good ones may do without them."""
    bad = [item for parts in reports.values() for part in parts for item in part.bad]
    for name, reason in sorted(map(tuple, bad)):
        print(f"bad image: {name}: {reason}", file=sys.stderr)
    if bad and not skip_bad:
        raise RunError(
            f"{len(bad)} of {num_examples} images are bad (listed above); no data set was made: "
            "mend or remove them, or leave them out with --skip_bad"
        )
    for output, parts in reports.items():
        empty = [part.info["name"] for part in parts if part.info["num_examples"] == 0]
        if empty:
            for place in places:
                place.discard()  # another number of parts has use for none of them
            raise RunError(
                f"{output}/{empty[0]}: would be empty, as all its images are bad (listed above); "
                "give fewer --num_parts, or mend the images"
            )


def default_num_workers(num_examples: int) -> int:
    """One per core, but only where there is enough to do for another process to be worth it."""
    return max(1, min(len(os.sched_getaffinity(0)), num_examples // 1000))


def left_to_make(splits: Sequence[Split], identities: dict[Path, dict]) -> list[Split]:
    """The splits without those that a run made before it was killed on its way to the others."""
    unfinished = [split for split in splits if partial_name(split.output).exists()]
    left = []
    for split in splits:
        made = identity_of_manifest(split.output / MANIFEST) == identities[split.output]
        if unfinished and made and split not in unfinished:
            print(f"note: {split.output}: was made by this command before", file=sys.stderr)
        else:
            left.append(split)
    return left


def write_dataset(
    splits: Sequence[Split],
    *,
    classes: Sequence[str],
    made_by: dict,
    num_parts: int | None = None,
    choose_num_parts: Callable[[int], int] = default_num_parts,
    seed: int = 0,
    skip_bad: bool = False,
    num_workers: int | None = 1,
) -> None:
    """Write every split, or none of them, and say on stdout what was made.

    `classes[label]` is the name of a class; `made_by` goes into the manifests. Images are read
    when they are written, so memory holds the names only. The bytes do not depend on `num_workers`
    (None: as many as there are cores, for large data); with several, loaders must be picklable.
    A run that was interrupted leaves its finished parts, and the same call goes on with them.
    Raises UsageError where an output is taken or there are more parts than examples, RunError for
    bad images (unless `skip_bad`) and for a disk that refuses.
    """
    for split in splits:
        if num_parts and num_parts > len(split.names):
            raise UsageError(
                f"--num_parts={num_parts}: {split.output} has {len(split.names)} examples, "
                "and a part needs one at least"
            )
    identities = {}
    for split in splits:
        count = num_parts or choose_num_parts(len(split.names))
        identities[split.output] = identity_of(made_by, classes, count)
    try:
        splits = left_to_make(splits, identities)
        for split in splits:
            check_output(split.output)
        num_examples = sum(len(split.names) for split in splits)
        reports = {}
        with contextlib.ExitStack() as stack:
            places = [
                stack.enter_context(Unfinished(split.output, identities[split.output]))
                for split in splits
            ]
            with Progress(num_examples) as progress:
                for split, place in zip(splits, places, strict=True):
                    if not place.complete:
                        reports[split.output] = write_split(
                            place,
                            split,
                            seed=seed,
                            skip_bad=skip_bad,
                            num_workers=num_workers or default_num_workers(num_examples),
                            advance=progress.advance,
                        )
            refuse_bad_images(reports, places, num_examples, skip_bad)
            for split, place in zip(splits, places, strict=True):
                if not place.complete:
                    write_split_manifest(place, split, reports[split.output], classes, made_by)
            for place in places:
                place.finish()
    except OSError as error:
        where = error.filename or splits[0].output
        raise RunError(f"{where}: cannot write: {error.strerror or error}") from None
    for split in splits:
        print_summary(split.output)


def write_split_manifest(
    place: Unfinished, split: Split, parts: list[PartReport], classes, made_by: dict
) -> None:
    bad = sorted(tuple(item) for part in parts for item in part.bad)
    changes = sorted((what, name) for part in parts for name, what in part.changes)
    if changes:
        counts = Counter(what for what, _ in changes)
        made_by = {**made_by, "re_encoded": dict(sorted(counts.items()))}
    if changes and split.list_changes:
        made_by["re_encoded_files"] = {
            what: [name for _, name in group]
            for what, group in itertools.groupby(changes, key=lambda change: change[0])
        }
    if bad:
        made_by = {**made_by, "left_out": [{"file": name, "reason": why} for name, why in bad]}
    write_manifest(
        place.directory,
        parts=[part.info for part in parts],
        classes=classes,
        made_by=made_by,
    )


def print_summary(output: Path) -> None:
    """Say what the manifest of a finished directory says."""
    manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    made_by, parts = manifest["made_by"], manifest["parts"]
    print(
        f"{output}: {manifest['num_examples']} examples of {manifest['num_classes']} classes in "
        f"{len(parts)} part{'s' if len(parts) > 1 else ''}, "
        f"{sum(part['num_bytes'] for part in parts)} bytes"
    )
    if changes := made_by.get("re_encoded"):
        kinds = ", ".join(f"{count} {what}" for what, count in changes.items())
        print(f"{output}: encoded as RGB JPEG: {kinds}")
    for what, names in made_by.get("re_encoded_files", {}).items():
        more = f", ... ({len(names)}, as listed in {MANIFEST})" if len(names) > 30 else ""
        print(f"{output}: {what}: {', '.join(names[:30])}{more}")
    if bad := made_by.get("left_out"):
        print(f"{output}: bad images left out, as listed in {MANIFEST}: {len(bad)}")


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """Read a class list, one class a line: a name, or a WordNet id and a name.

    Returns the names and the WordNet ids (empty if the file has none), index = label.
    Raises UsageError for a file that is missing, empty, mixed or has one class twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
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
