"""List the runs under a directory: network, data, flags that differ, best accuracy, disk, state.

python3 tools/runs.py                                # of output/snapshots
python3 tools/runs.py output/snapshots --prune       # which snapshots could go
python3 tools/runs.py output/snapshots --prune --yes # removes them

A run keeps its best, last and newest snapshot; a run that goes on keeps all.
"""

import fcntl
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.environment  # noqa: F401  (first, see there)

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cnns.errors import RunError, UsageError, printable, run_main, say
from cnns.flags.parser import Parser, add_switch, show
from cnns.places import SNAPSHOT_ROOT
from cnns.record import METRICS, RunRecord, read_run

EPOCH = re.compile(r"snapshot_epoch_(\d+)")
MAX_DIFFERING = 4  # flags shown of a run
FILE_COLUMNS = 200  # of the table where it does not go to a terminal
# Flags that say where a run wrote or read, not what it was.
PLACES = ("model_save_dir", "log_dir", "resume", "config")


@dataclass(frozen=True)
class Run:
    record: RunRecord
    state: str
    best: dict  # line of metrics.csv
    num_epochs: int  # finished
    num_bytes: int
    removable: list[str]  # paths of snapshots
    freed_bytes: int


def main(argv: list[str] | None = None) -> int | None:
    args = parse_args(argv)
    runs = [look_at(path) for path in find_runs(args.directory)]
    if not runs:
        raise UsageError(f"{args.directory} holds no run; give what holds runs' directories")
    if args.prune:
        prune(runs, really=args.yes)
    else:
        print_table(runs)
    return None


def parse_args(argv: list[str] | None) -> Namespace:
    parser = Parser("List the runs under a directory.")
    parser.add_argument(
        "directory", nargs="?", default=SNAPSHOT_ROOT, help="searched with all below it"
    )
    add_switch(parser, "--prune", "show the snapshots that are not the best, last or newest")
    add_switch(parser, "--yes", "with --prune: remove them")
    args = parser.parse_args(argv)
    if args.yes and not args.prune:
        raise UsageError("--yes belongs to --prune; give both")
    if not os.path.isdir(args.directory):
        raise UsageError(f"there is no directory {args.directory}; train first, or give another")
    return args


def find_runs(root: str) -> list[str]:
    """Directories with a record, by name; links are not followed."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "snapshot_"))]
        if METRICS in files:
            found.append(folder)
    return sorted(found)


def look_at(directory: str) -> Run:
    try:
        record = read_run(directory)
    except RunError as error:
        say(str(error), sys.stderr)
        record = RunRecord(directory, {}, [])
    rows = record.epochs()
    planned = record.flags.get("num_epochs")
    scored = [row for row in rows if row.get("val_top_1") is not None]
    validates = bool(record.about.get("val_images"))
    finished = len(scored) if validates else whole_epochs(record)
    if is_running(directory):
        state = "running"
    else:
        state = "finished" if planned is not None and finished == planned else "interrupted"
    removable = [] if state == "running" else removable_snapshots(directory)
    return Run(
        record,
        state,
        max(scored, key=lambda row: row["val_top_1"], default={}),
        finished,
        num_bytes=sum(size for size, _, _ in files_under([directory])),
        removable=removable,
        freed_bytes=freed_bytes(removable),
    )


def whole_epochs(record: RunRecord) -> int:
    steps = record.about.get("steps_per_epoch")
    return sum(each["iteration"] == steps for each in record.of_kind("train"))


def is_running(directory: str) -> bool:
    """Whether a training process holds the lock on its directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def removable_snapshots(directory: str) -> list[str]:
    """All snapshots of epochs but the newest; `best` and `last` stand beside them.

    A link or a file of such a name is none, and stays.
    """
    found = {
        int(match[1]): match[0] for match in map(EPOCH.fullmatch, os.listdir(directory)) if match
    }
    paths = [os.path.join(directory, name) for _, name in sorted(found.items())]
    return [path for path in paths if os.path.isdir(path) and not os.path.islink(path)][:-1]


def files_under(paths: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """Bytes, names it has, and names it has here, of each file, those of several names once."""
    seen: dict[tuple[int, int], tuple[os.stat_result, int]] = {}
    for path in paths:
        for folder, _, names in os.walk(path):
            for name in names:
                with suppress(FileNotFoundError):  # a run that goes on replaces files
                    status = os.lstat(os.path.join(folder, name))
                    key = (status.st_dev, status.st_ino)
                    seen[key] = status, seen.get(key, (status, 0))[1] + 1
    return ((s.st_size, s.st_nlink, here) for s, here in seen.values())


def freed_bytes(paths: Sequence[str]) -> int:
    """What removing directories gives back: a file that `best` shares stays."""
    return sum(size for size, names, here in files_under(paths) if names == here)


def prune(runs: Sequence[Run], *, really: bool) -> None:
    paths = [path for run in runs for path in run.removable]
    for path in paths:
        say(path, sys.stdout)
        if really:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise RunError(f"cannot remove {path}: {error.strerror}") from None
    freed = size_text(sum(run.freed_bytes for run in runs))
    done = "removed" if really else "would be removed; --yes removes them"
    say(f"{len(paths)} snapshots, {freed}, {done}", sys.stderr)


def print_table(runs: Sequence[Run]) -> None:
    differing = differing_flags([run.record for run in runs])
    table = Table(box=SIMPLE_HEAD)
    for name in ("run", "state", "epochs", "best top-1", "network", "disk", "data", "flags"):
        table.add_column(name, overflow="fold", no_wrap=name in ("state", "epochs", "disk"))
    for run in runs:
        flags = [(n, run.record.flags.get(n)) for n in differing]
        texts = [f"{n}={show(value)}" for n, value in flags if value is not None]
        more = f" and {len(texts) - MAX_DIFFERING} more" if len(texts) > MAX_DIFFERING else ""
        best = run.best.get("val_top_1")
        cells = (
            run.record.name,
            run.state,
            f"{run.num_epochs}/{run.record.flags.get('num_epochs', '?')}",
            "" if best is None else f"{best:.4f} (epoch {run.best['epoch']})",
            str(run.record.about.get("model", "?")),
            size_text(run.num_bytes),
            str(run.record.flags.get("train_data_dir") or "synthetic"),
            " ".join(texts[:MAX_DIFFERING]) + more,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else FILE_COLUMNS).print(table)


def differing_flags(records: Sequence[RunRecord]) -> list[str]:
    """Names of the flags that are not the same in all runs, but for those of places."""
    names = sorted({name for record in records for name in record.flags} - set(PLACES))
    known = [record for record in records if record.flags]
    return [n for n in names if len({show(record.flags.get(n)) for record in known}) > 1]


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(run_main(main))
