"""Directories of parts while they are being made: journal, lock, and what an interrupted run left.

A directory is filled under the name `<directory>.partial`; `journal.jsonl` in it names the finished
parts, their checksums, and a digest of the entries they were made of.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cnns.checkpoint.files import sync_directory, try_lock
from cnns.data.format import MANIFEST, TEMPORARY, read_manifest, write_whole
from cnns.errors import RunError, UsageError

JOURNAL = "journal.jsonl"
LOCK_SECONDS = 1.0


@dataclass(frozen=True)
class PartReport:
    info: dict  # the part's entry in the manifest
    bad: list[tuple[str, str]]  # (name, reason)
    changes: list[tuple[str, str]]  # (name, what the source was)
    source: str  # digest of the entries that the part was made of

    def journal_line(self, index: int) -> str:
        return json.dumps({"index": index, **asdict(self)}) + "\n"


def partial_name(output: Path) -> Path:
    """Where `output` is filled: beside it, or beside the directory that it is a link to."""
    place = output.resolve()
    return place.with_name(place.name + ".partial")


def read_journal(path: Path) -> tuple[dict, dict[int, PartReport]]:
    """The identity in the journal of an unfinished directory, and the finished parts.

    The last line may be cut off, as the run may have been killed while it wrote it.
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
            "to resume, remove it to start again, or give another --output"
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


def identity_of_manifest(directory: Path) -> dict | None:
    try:
        manifest = read_manifest(directory) or {}
        return identity_of(manifest["made_by"], manifest["classes"], len(manifest["parts"]))
    except (RunError, KeyError, TypeError, AttributeError):
        return None


def lock(handle: int, directory: Path) -> None:
    """Lock an open directory. Raises UsageError while another run holds it.

    It waits LOCK_SECONDS, as the workers of a run that was killed hold it for a moment longer.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while not try_lock(handle):
        if time.monotonic() > deadline:
            raise UsageError(
                f"{directory}: another run is writing it now; wait for it, or give another --output"
            )
        time.sleep(0.02)


@contextlib.contextmanager
def unfinished(output: Path, identity: dict) -> Iterator["Unfinished"]:
    """`<output>.partial`, locked: new, or left by an interrupted run of the same command.

    If the block raises, the finished parts are kept; if there are none, the directory is removed.
    """
    place = Unfinished(output, partial_name(output), identity)
    place.directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(place.directory, os.O_RDONLY)
    try:
        lock(handle, place.directory)
        place.look()
        try:
            place.begin()
            yield place
        except BaseException:
            place.leave()
            raise
    finally:
        os.close(handle)


@dataclass
class Unfinished:
    output: Path
    directory: Path
    identity: dict
    finished: dict[int, PartReport] = field(default_factory=dict)
    reports: list[PartReport] = field(default_factory=list)  # of all parts, once they are made
    complete: bool = False  # only the name is missing

    def look(self) -> None:
        """Read what an earlier run left. Raises UsageError where that was another command."""
        names = sorted(os.listdir(self.directory))
        others = [name for name in names if not name.endswith(TEMPORARY)]
        if JOURNAL in others:
            try:
                before, self.finished = read_journal(self.directory / JOURNAL)
            except ValueError:
                raise UsageError(
                    f"{self.directory / JOURNAL}: cannot be read; remove {self.directory} to start "
                    "again"
                ) from None
            refuse_other(self.directory, before, self.identity)
        elif MANIFEST in others:
            before = identity_of_manifest(self.directory) or {}
            refuse_other(self.directory, before, self.identity)
            self.complete = True
        elif others:
            raise UsageError(
                f"{self.directory}: holds {others[0]} but no {JOURNAL}, so nothing is known about "
                "it; remove it, or give another --output"
            )

    def begin(self) -> None:
        if self.complete:
            return
        self.remove_temporary()
        text = json.dumps(self.identity) + "\n"
        text += "".join(report.journal_line(k) for k, report in self.finished.items())
        write_whole(self.directory / JOURNAL, text.encode())

    def record(self, index: int, report: PartReport) -> None:
        """Note a part that is on disk."""
        self.finished[index] = report
        with open(self.directory / JOURNAL, "ab") as file:
            file.write(report.journal_line(index).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give a directory that has its manifest its own name."""
        (self.directory / JOURNAL).unlink(missing_ok=True)
        # Replaces an empty directory, and no other.
        os.rename(self.directory, self.output.resolve())
        sync_directory(self.directory.parent)

    def leave(self) -> None:
        if self.complete or not self.directory.is_dir():
            return
        if not self.finished:
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        self.remove_temporary()
        print(
            f"note: {self.directory}: {len(self.finished)} of {self.identity['number of parts']} "
            "parts are finished and kept; the same command resumes from there",
            file=sys.stderr,
        )

    def remove_temporary(self) -> None:
        for path in self.directory.glob("*" + TEMPORARY):
            path.unlink(missing_ok=True)
