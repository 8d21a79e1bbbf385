"""The record of a run, which stands beside its snapshots, and how to read it.

    log.txt        every line and notice, as they were printed
    metrics.jsonl  one object for each line of figures
    metrics.csv    one line for each finished epoch
    flags.yaml     what was run: flags, versions, machine, command; --config reads it back

A run that resumes here first drops the figures of steps that come after the snapshot, since it
takes these steps again. Nothing here needs OneFlow.
"""

import csv
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from cnns import errors
from cnns.data.format import write_whole
from cnns.errors import RunError, UsageError, describe
from cnns.inputs import open_input
from cnns.jsonfile import (
    Damaged,
    anything,
    integer,
    one_of,
    optional,
    parse_json,
    real,
    record,
    refuse,
    string,
)
from cnns.yamlfile import read_yaml

LOG, METRICS, EPOCHS, FLAGS = "log.txt", "metrics.jsonl", "metrics.csv", "flags.yaml"
TENSORBOARD = "tensorboard"  # directory of its event files
COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_top_1",
    "train_top_k",
    "val_loss",
    "val_top_1",
    "val_top_k",
    "samples_per_second",  # of training
)

LAST_TIME = 250_000_000_000  # s since 1970, in the year 9892: dates end with 9999
FIGURE = real(-1e39, 1e39)  # of float32

COMMON = {
    "kind": one_of(("train", "validation")),
    **dict.fromkeys(("epoch", "iteration", "step"), integer(0)),
    **dict.fromkeys(("top_1", "top_k"), real(0, 1)),
    "samples": integer(1),
    "samples_per_second": real(1e-9, 1e39),
}
TIME = {"time": real(0, LAST_TIME)}
OF_TRAINING = record(
    COMMON | {"loss": FIGURE, "learning_rate": FIGURE},
    TIME | {"records_digest": string},
    others=FIGURE,
)
OF_VALIDATION = record(COMMON, TIME, others=FIGURE)


def check_flags(value: Any, where: str) -> None:
    """The flags in a flags.yaml: texts, numbers, truth values, none, and lists of these."""
    if not isinstance(value, dict):
        refuse(value, where, "a mapping")
    for name, each in value.items():
        string(name, f"a name in {where}")
        for item in each if isinstance(each, list) else [each]:
            if isinstance(item, dict | list):
                refuse(each, f"{where}.{name}", "a value of a flag")


# What is read of a flags.yaml.
ABOUT = record(
    {},
    {
        "flags": check_flags,
        **dict.fromkeys(("model", "git_commit"), optional(string)),
        **dict.fromkeys(("train_images", "val_images", "steps_per_epoch"), optional(integer(0))),
    },
    others=anything,
)


def check_entry(entry: Any) -> None:
    """A line of metrics.jsonl. Raises Damaged."""
    of_training = isinstance(entry, dict) and entry.get("kind") == "train"
    (OF_TRAINING if of_training else OF_VALIDATION)(entry, "")


class Record:
    """What a run writes down. This one writes nothing: that of every process but the first."""

    def line(self, text: str) -> None:
        """A line or notice that was printed."""

    def add(self, kind: str, *, epoch: int, iteration: int, step: int, **figures: Any) -> None:
        """The figures of a `train` or `validation` line; those that are None or not finite are not
        written.

        Raises RunError where the file cannot be written.
        """

    def finish_epoch(self) -> None:
        """Write the line of an epoch whose figures are complete."""


class FileRecord(Record):
    """The record in the directory of a run that stands at `step`, with `epochs` finished epochs."""

    def __init__(self, directory: str, *, step: int, epochs: int, tensorboard: bool):
        self.directory = directory
        kept = [each for each in read_metrics(self.path(METRICS)) if is_before(each, step, epochs)]
        lines = "".join(json.dumps(each) + "\n" for each in kept)
        write_whole(Path(self.path(METRICS)), lines.encode())
        self.current = kept  # figures since the last finished epoch
        self.epochs: list[dict] = []
        for epoch in range(epochs):
            self.add_epoch([each for each in kept if each["epoch"] == epoch])
        self.current = [each for each in kept if each["epoch"] >= epochs]
        self.write_epochs()
        self.metrics = self.open(METRICS)
        self.log = self.open(LOG)
        self.board = open_board(self.path(TENSORBOARD), step=step) if tensorboard else None

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def open(self, name: str) -> TextIO:
        return open(self.path(name), "a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def close(self) -> None:
        for file in (self.metrics, self.log, self.board):
            with suppress(OSError):  # a full disk has been named
                if file is not None:
                    file.close()

    def line(self, text: str) -> None:
        with suppress(OSError):  # of a full disk, figures and snapshots tell
            self.log.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    def add(self, kind: str, *, epoch: int, iteration: int, step: int, **figures: Any) -> None:
        entry = {"kind": kind, "epoch": epoch, "iteration": iteration, "step": step}
        figures = {n: v for n, v in figures.items() if isinstance(v, str) or is_number(v)}
        entry |= figures
        entry["time"] = round(time.time(), 3)
        # Of this process, at its peak.
        entry["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with named(self.path(METRICS)):
            self.metrics.write(json.dumps(entry, allow_nan=False) + "\n")
        self.current.append(entry)
        if self.board is not None:
            for name, value in figures.items():
                if is_number(value):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
            self.board.flush()

    def finish_epoch(self) -> None:
        self.add_epoch(self.current)
        self.current = []
        self.write_epochs()

    def add_epoch(self, entries: list[dict]) -> None:
        if entries:
            self.epochs.append(summarise(entries))

    def write_epochs(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        with named(self.path(EPOCHS)):
            write_whole(Path(self.path(EPOCHS)), text.getvalue().encode())


@contextmanager
def named(path: str) -> Iterator[None]:
    """Raise RunError with the name of a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; make room, then resume with --resume=auto"
        ) from None


@contextmanager
def open_record(
    directory: str, *, step: int, epochs: int, about: Mapping, tensorboard: bool
) -> Iterator[Record]:
    """The record of a run in `directory`; `about` goes into flags.yaml.

    What is said meanwhile, and the error that ends the run, goes into log.txt. Raises RunError
    where a file cannot be written.
    """
    try:
        record = FileRecord(directory, step=step, epochs=epochs, tensorboard=tensorboard)
        text = yaml.safe_dump(plain(about), sort_keys=False, allow_unicode=True)
        with named(record.path(FLAGS)):
            write_whole(Path(record.path(FLAGS)), text.encode())
        errors.listeners.append(record.line)
    except OSError as error:
        raise RunError(f"cannot write {error.filename or directory}: {error.strerror}") from None
    try:
        yield record
    except Exception as error:
        record.line(f"error: {describe(error)[1]}")
        raise
    finally:
        errors.listeners.remove(record.line)
        record.close()


def open_board(directory: str, *, step: int) -> Any:
    """TensorBoard's writer; what was written there for later steps is not shown."""
    from tensorboardX import SummaryWriter  # half a second, for those who ask for it

    return SummaryWriter(directory, purge_step=step + 1)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def plain(value: Any) -> Any:
    """A value as YAML knows it."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple | list) else value


def describe_process(devices: Iterable[str]) -> dict[str, Any]:
    """What flags.yaml says of the program, the machine and the command."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "command": [sys.executable, *sys.argv],
        "machine": {
            "name": platform.node(),
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "devices": list(devices),
        },
    }


def git_commit() -> str | None:
    """The commit of this program, with `-dirty` behind it where files differ; None: unknown."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# Reading.


@dataclass(frozen=True)
class RunRecord:
    """What a run has written so far."""

    directory: str
    about: dict  # flags.yaml
    metrics: list[dict]  # metrics.jsonl

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.directory))

    @property
    def flags(self) -> dict:
        return self.about.get("flags", {})

    def of_kind(self, kind: str) -> list[dict]:
        return [each for each in self.metrics if each["kind"] == kind]

    def epochs(self) -> list[dict]:
        """The lines of metrics.csv, and one of the epoch that runs."""
        of_epochs: dict[int, list[dict]] = {}
        for each in self.metrics:
            of_epochs.setdefault(each["epoch"], []).append(each)
        return [summarise(entries) for _, entries in sorted(of_epochs.items())]


def read_run(directory: str) -> RunRecord:
    """The record in the directory of a run, also while it goes on.

    Raises UsageError where there is none, and RunError where it is damaged.
    """
    metrics, flags = (os.path.join(directory, name) for name in (METRICS, FLAGS))
    if not os.path.exists(metrics):
        raise UsageError(
            f"{directory} is not the directory of a run: it has no {METRICS}; give what "
            "--model_save_dir named, or a directory under output/snapshots"
        )
    try:
        about = read_yaml(flags)
        ABOUT(about, "")
    except FileNotFoundError:
        about = {}
    except (OSError, Damaged) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{flags} cannot be read ({reason}); correct it, or remove it") from None
    return RunRecord(directory, about, read_metrics(metrics))


def read_metrics(path: str) -> list[dict]:
    """The objects of a metrics.jsonl, in order; none where the file is not there.

    A last line that was cut off by a kill is left out. Raises RunError where another is damaged.
    """
    try:
        with open_input(path) as file:
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    lines, entries = text.split("\n"), []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = parse_json(line)
            check_entry(entry)
        except Damaged as error:
            raise RunError(
                f"{path}: line {number} is not one of a run's figures ({error}); remove that line"
            ) from None
        entries.append(entry)
    return entries


def is_before(entry: Mapping, step: int, epochs: int) -> bool:
    """Whether figures belong to what a run at `step`, with `epochs` finished epochs, has done."""
    if entry["step"] == step and entry["kind"] == "validation":
        return entry["epoch"] < epochs
    return entry["step"] <= step


def summarise(entries: list[dict]) -> dict[str, Any]:
    """The line of metrics.csv for the figures of an epoch: means over its samples."""
    train = [each for each in entries if each["kind"] == "train"]
    row: dict[str, Any] = {name: entries[-1][name] for name in ("epoch", "step")}
    samples = sum(each["samples"] for each in train)
    for name in ("loss", "top_1", "top_k"):
        if samples:
            total = math.fsum(each[name] * each["samples"] for each in train)
            row[f"train_{name}"] = total / samples
    if train:
        row["learning_rate"] = train[-1]["learning_rate"]
        seconds = sum(each["samples"] / each["samples_per_second"] for each in train)
        row["samples_per_second"] = round(samples / seconds, 3)
    for each in entries:
        if each["kind"] == "validation":
            row |= {f"val_{name}": each.get(name) for name in ("loss", "top_1", "top_k")}
    return row
