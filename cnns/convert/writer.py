"""Directories of OFRecord parts: equal input and seed give equal bytes; never half a directory.

A directory is filled under the name `<directory>.partial` and takes its own name only when every
part and, last, `manifest.json` are on disk; so a run that was killed leaves nothing that a reader
would take for data. A part depends on its own entries alone, not on the parts before it, so parts
are written by several processes, and an interrupted run can be resumed: `journal.jsonl` in the
partial directory names the finished parts, their checksums, and a digest of the entries they were
made of.
"""

import contextlib
import hashlib
import itertools
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cnns.convert.pool import Advance, Progress, run_tasks
from cnns.convert.unfinished import (
    JOURNAL,
    PartReport,
    Unfinished,
    identity_of,
    identity_of_manifest,
    partial_name,
    read_journal,
    unfinished,
)
from cnns.data.format import (
    LENGTH,
    MANIFEST,
    TEMPORARY,
    encode_record,
    part_name,
    read_manifest,
    write_manifest,
)
from cnns.data.images import BadImage
from cnns.errors import RunError, UsageError, printable
from cnns.inputs import open_input

BLOCK_BYTES = 1 << 20
SEND_BYTES = 8 << 20  # between calls that have the disk begin to write
KEPT = "kept"  # what became of a part that an earlier run made


@dataclass(frozen=True)
class Example:
    """One record to write. `more` holds further features, as `encode_record` takes them."""

    encoded: bytes  # an RGB JPEG
    label: int  # 0-based
    change: str = ""  # what the source was, where `encoded` is not the source's own bytes
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """One directory to make: the names of its examples, for messages, and how to get each one.

    `load(i)` returns the Example called `names[i]` or raises BadImage. It is called once for each
    i, in no particular order, and must give the same bytes every time. It may have a method
    `fingerprint(i, with_time=True)`: bytes that change when the source of the i-th example changes;
    without its time they are the same for equal copies of it.
    """

    output: Path
    names: Sequence[str]
    load: Callable[[int], Example]
    list_changes: bool = False  # name each example that is not its source's own bytes


def read_image(path: str) -> bytes:
    """The bytes of an image file. Raises BadImage."""
    try:
        with open_input(path) as file:
            return file.read()
    except OSError as error:
        raise BadImage(error.strerror) from None


def file_stamp(path: str, label: int, *, with_time: bool = True) -> bytes:
    """Bytes that change when an image file or its label changes."""
    try:
        state = os.stat(path)
    except OSError:
        return f"{label} missing".encode()
    return f"{label} {state.st_size} {state.st_mtime_ns if with_time else ''}".encode()


def write_part(path: Path, messages: Iterable[bytes]) -> dict:
    """Write serialised OFRecords as a part, and return its entry in the manifest.

    It has a temporary name until it is complete. Raises OSError.
    """
    # A worker may outlive its killed parent for a moment, and must not write the next run's file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    digest, num_examples, num_bytes, sent = hashlib.sha256(), 0, 0, 0
    try:
        with open(temporary, "wb", buffering=BLOCK_BYTES) as file:
            for message in messages:
                for piece in (LENGTH.pack(len(message)), message):
                    file.write(piece)
                    digest.update(piece)
                    num_bytes += len(piece)
                num_examples += 1
                if num_bytes - sent > SEND_BYTES:
                    # The disk starts writing now, so that fsync has little left to wait for, and
                    # what is written leaves the page cache to the input.
                    sent = num_bytes
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "name": path.name,
        "num_examples": num_examples,
        "num_bytes": num_bytes,
        "sha256": digest.hexdigest(),
    }


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


def is_made(split: Split, identity: dict, made_by: dict) -> bool:
    """Whether the output of a split is there, made of the same input with the same arguments."""
    if identity_of_manifest(split.output) != identity:
        return False
    before = (read_manifest(split.output) or {})["made_by"]
    skip_bad = [(each.get("arguments") or {}).get("skip_bad") for each in (before, made_by)]
    return skip_bad[0] == skip_bad[1] and before.get("input") == input_digest(split)


def digest_of(split: Split, positions: Iterable[int], **options: bool) -> str:
    """A digest of the names of some examples and of what `load.fingerprint` says of them."""
    fingerprint = getattr(split.load, "fingerprint", lambda i, **_: b"")
    digest = hashlib.sha256()
    for i in positions:
        name = split.names[i].encode("utf-8", "surrogateescape")
        digest.update(name + b"\0" + fingerprint(i, **options))
    return digest.hexdigest()


def input_digest(split: Split) -> str:
    """Of all examples: what a manifest says about its input. The same for equal copies of it."""
    return digest_of(split, range(len(split.names)), with_time=False)


def begun_parts(output: Path) -> int | None:
    """The number of parts of an output that is there, or that a run has begun."""
    made = identity_of_manifest(output)
    if made is None:
        try:
            made, _ = read_journal(partial_name(output) / JOURNAL)
        except (OSError, ValueError):
            return None
    count = made.get("number of parts") if isinstance(made, dict) else None
    return count if isinstance(count, int) else None


def default_num_parts(num_examples: int) -> int:
    """A multiple of 8, of parts of up to 10,000 examples: 2, 4 and 8 processes can share them.

    Small data make 4, 2 or 1, of 64 examples at least.
    """
    if num_examples < 8 * 64:
        return shareable(num_examples // 64)
    return 8 * -(-num_examples // 80_000)


def shareable(limit: int) -> int:
    """The largest number of parts up to `limit` that 2, 4 and 8 processes can share, if any can."""
    return limit // 8 * 8 or next((count for count in (4, 2) if count <= limit), 1)


def shuffled_parts(num_examples: int, num_parts: int, seed: int) -> list[np.ndarray]:
    """Positions of the examples of each part: a shuffle, cut into runs that differ by 1 at most."""
    order = list(range(num_examples))
    random.Random(seed).shuffle(order)  # Python keeps this sequence from version to version
    shuffled = np.array(order, np.int64)
    bounds = [k * num_examples // num_parts for k in range(num_parts + 1)]
    return [shuffled[a:b] for a, b in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class PartTask:
    """One part to be made, or to be kept where an earlier run made it of the same entries."""

    path: Path
    split: Split
    positions: list[int]
    earlier: PartReport | None = None

    def __call__(self, advance: Advance) -> tuple[PartReport, str]:
        """Its report, and KEPT, or why the part of an earlier run was made again."""
        source, why = digest_of(self.split, self.positions), ""
        if self.earlier:
            why = self.why_not_kept(self.earlier, source)
            if not why:
                advance(len(self.positions))
                return self.earlier, KEPT
        report = PartReport({}, bad=[], changes=[], source=source)
        report.info.update(write_part(self.path, self.messages(report, advance)))
        return report, why

    def messages(self, report: PartReport, advance: Advance) -> Iterator[bytes]:
        """The records, in order, without the bad ones, which go into the report."""
        for i in self.positions:
            name = self.split.names[i]
            try:
                example = self.split.load(i)
            except BadImage as error:
                report.bad.append((name, str(error)))
            else:
                if example.change:
                    report.changes.append((name, example.change))
                yield encode_record(example.encoded, example.label, **example.more)
            advance(1)

    def why_not_kept(self, earlier: PartReport, source: str) -> str:
        if source != earlier.source:
            return "the input has changed"
        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
        except FileNotFoundError:
            return "it was missing"
        return "" if digest.hexdigest() == earlier.info["sha256"] else "it was damaged"


def part_tasks(split: Split, place: Unfinished, seed: int, skip_bad: bool) -> Iterator[PartTask]:
    num_examples, num_parts = len(split.names), place.identity["number of parts"]
    for k, positions in enumerate(shuffled_parts(num_examples, num_parts, seed)):
        earlier = place.finished.get(k)
        if earlier and earlier.bad and not skip_bad:
            earlier = None  # the images may have been replaced
        yield PartTask(place.directory / part_name(k), split, positions.tolist(), earlier)


def write_parts(
    split: Split,
    place: Unfinished,
    *,
    seed: int,
    skip_bad: bool,
    num_workers: int,
    advance: Advance,
) -> None:
    """Make the parts that are missing, and fill in the reports of all."""
    reports, outcomes, earlier = {}, Counter[str](), len(place.finished)
    tasks = part_tasks(split, place, seed, skip_bad)
    running = run_tasks(tasks, num_workers=num_workers, advance=advance)
    with contextlib.closing(running):  # ends the workers whatever happens here
        for k, (report, outcome) in running:
            reports[k] = report
            outcomes[outcome] += 1
            if outcome != KEPT and (skip_bad or not report.bad):
                place.record(k, report)
    place.reports = [reports[k] for k in sorted(reports)]
    if earlier:
        kept, _ = outcomes.pop(KEPT, 0), outcomes.pop("", 0)
        again = "".join(f"; {n} made again, as {why}" for why, n in sorted(outcomes.items()))
        print(
            f"note: {place.output}: {kept} parts of {len(reports)} were there from an "
            f"earlier run{again}",
            file=sys.stderr,
        )


def refuse_bad_images(places: Sequence[Unfinished], num_examples: int, skip_bad: bool) -> None:
    """Name every bad image on stderr; raise RunError unless they may be left out."""
    bad = sorted(tuple(item) for place in places for part in place.reports for item in part.bad)
    for name, reason in bad:
        print(printable(f"bad image: {name}: {reason}"), file=sys.stderr)
    if bad and not skip_bad:
        raise RunError(
            f"{len(bad)} of {num_examples} images are bad (listed above); no data set was made: "
            "replace or remove them, or leave them out with --skip_bad"
        )
    for place in places:
        for part in place.reports:
            if part.info["num_examples"] == 0:
                for each in places:
                    each.finished.clear()  # of no use with another number of parts
                raise RunError(
                    f"{place.output}/{part.info['name']}: would be empty, as all its images "
                    "are bad (listed above); give fewer --num_parts, or replace the images"
                )


def default_num_workers(num_examples: int) -> int:
    """One per core, but only where there is enough to do for another process to be worth it."""
    return max(1, min(len(os.sched_getaffinity(0)), num_examples // 1000))


def left_to_make(
    splits: Sequence[Split], identities: dict[Path, dict], made_by: dict
) -> list[Split]:
    """The splits without those that this command has made before of the same input."""
    unfinished = [split for split in splits if partial_name(split.output).exists()]
    left = []
    for split in splits:
        identity = identities[split.output]
        if split not in unfinished and is_made(split, identity, made_by):
            print(
                f"note: {split.output}: is complete; this command made it before", file=sys.stderr
            )
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
    (None: as many as there are cores, for large data). A run that was interrupted leaves its
    finished parts, and the same call makes the rest.
    Raises UsageError where an output is taken or there are more parts than examples, RunError for
    bad images (unless `skip_bad`) and for a disk that cannot be written.
    """
    identities = {}
    for split in splits:
        if num_parts and num_parts > len(split.names):
            raise UsageError(
                f"--num_parts={num_parts}: {split.output} has {len(split.names)} examples, "
                "and a part needs one at least"
            )
        begun = begun_parts(split.output)
        fits = begun is not None and 0 < begun <= len(split.names)
        count = num_parts or (begun if fits else None) or choose_num_parts(len(split.names))
        identities[split.output] = identity_of(made_by, classes, count)
    try:
        left = left_to_make(splits, identities, made_by)
        for split in left:
            check_output(split.output)
        num_examples = sum(len(split.names) for split in left)
        with contextlib.ExitStack() as stack:
            places = [
                stack.enter_context(unfinished(split.output, identities[split.output]))
                for split in left
            ]
            with Progress(num_examples) as progress:
                for split, place in zip(left, places, strict=True):
                    if not place.complete:
                        write_parts(
                            split,
                            place,
                            seed=seed,
                            skip_bad=skip_bad,
                            num_workers=num_workers or default_num_workers(num_examples),
                            advance=progress.advance,
                        )
            refuse_bad_images(places, num_examples, skip_bad)
            for split, place in zip(left, places, strict=True):
                if not place.complete:
                    write_manifest(
                        place.directory,
                        parts=[part.info for part in place.reports],
                        classes=classes,
                        made_by=made_by
                        | {"input": input_digest(split)}
                        | report_of(place.reports, split.list_changes),
                    )
            for place in places:
                place.finish()
    except OSError as error:
        where = error.filename or splits[0].output
        raise RunError(f"{where}: cannot write: {error.strerror or error}") from None
    for split in splits:
        print_summary(split.output)


def report_of(parts: list[PartReport], list_changes: bool) -> dict:
    """What the manifest says about images that are not their source's own bytes, or left out."""
    bad = sorted(tuple(item) for part in parts for item in part.bad)
    changes = sorted((what, name) for part in parts for name, what in part.changes)
    facts: dict[str, object] = {}
    if changes:
        facts["re_encoded"] = dict(sorted(Counter(what for what, _ in changes).items()))
    if changes and list_changes:
        facts["re_encoded_files"] = {
            what: [name for _, name in group]
            for what, group in itertools.groupby(changes, key=lambda change: change[0])
        }
    if bad:
        facts["left_out"] = [{"file": name, "reason": why} for name, why in bad]
    return facts


def print_summary(output: Path) -> None:
    """Say what the manifest of a finished directory says."""
    manifest = read_manifest(output)
    assert manifest is not None
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
        print(printable(f"{output}: {what}: {', '.join(names[:30])}{more}"))
    if bad := made_by.get("left_out"):
        print(f"{output}: bad images left out, as listed in {MANIFEST}: {len(bad)}")
