"""Where snapshots are: the directory of a run, the one to read, the one to resume."""

import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from oneflow import nn

from cnns.checkpoint.files import (
    OLD,
    atomic_directory,
    existing_path,
    remove_directory,
    remove_leftovers,
    try_lock,
    write_durably,
)
from cnns.checkpoint.snapshot import (
    DESCRIPTION,
    EPOCH_NAME,
    PREFIX,
    Snapshot,
    check_files,
    read_description,
)
from cnns.checkpoint.weights import Checkpoint, check_fits, open_checkpoint, read_resumable
from cnns.errors import RunError, UsageError
from cnns.hints import path_hint
from cnns.inputs import check_ordinary
from cnns.log import is_first_rank, notice
from cnns.models.layers import Switches
from cnns.models.model import Models, check_switches
from cnns.places import PUBLISHED_FOLDER, SNAPSHOT_ROOT

SnapshotCheck = Callable[[Snapshot, str], None]  # with its path


@contextmanager
def open_save_dir(save_dir: str | None, *, resumed: str | None = None) -> Iterator[str]:
    """The directory that snapshots go to: created, checked to be writable, locked for this process.

    Unless one is given it is that of the snapshot `resumed`, else a new one under SNAPSHOT_ROOT,
    named after the time; if two runs start within one second, the later one gets the suffix `-2`.
    Only the first process of a job, which alone saves, does any of this; to the others a new
    directory is "".

    Raises UsageError where it cannot be written, another process is using it, or it holds snapshots
    that this run does not resume.
    """
    if save_dir is None and resumed is not None:
        save_dir = os.path.dirname(os.path.abspath(resumed))
    if not is_first_rank():
        yield save_dir or ""
        return
    try:
        if save_dir is None:
            save_dir = make_timed_dir()
        os.makedirs(save_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
        handle = os.open(save_dir, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"--model_save_dir: cannot write to {save_dir or error.filename}: {error.strerror}; "
            "give another"
        ) from None
    try:
        if not try_lock(handle):
            raise UsageError(
                f"--model_save_dir: another run is writing to {save_dir}; wait for it to end, or "
                "give another directory"
            )
        check_save_dir(save_dir, resumed)
        remove_leftovers(save_dir, f".{PREFIX}")
        yield save_dir
    finally:
        os.close(handle)


def check_save_dir(save_dir: str, resumed: str | None) -> None:
    """Refuse a directory with snapshots that this run would overwrite.

    In the directory of the resumed run, damaged snapshots are renamed.
    """
    names = [name for name in sorted(os.listdir(save_dir)) if name.startswith(PREFIX)]
    if resumed is None or not os.path.samefile(os.path.dirname(os.path.abspath(resumed)), save_dir):
        if names:
            raise UsageError(
                f"--model_save_dir: {save_dir} already holds {names[0]} of another run; nothing is "
                "overwritten, so give another directory, or resume with --resume"
            )
        return
    start = position(read_description(resumed))
    for name in names:
        path = os.path.join(save_dir, name)
        if os.path.exists(path) and os.path.samefile(path, resumed):
            continue
        if name.endswith(OLD):  # of a run that was killed while it replaced this one
            name, path = name.removesuffix(OLD), path.removesuffix(OLD)
            if os.path.exists(path):
                remove_directory(path + OLD)
                continue
            os.rename(path + OLD, path)
        try:
            later = position(read_description(path)) > start
            check_files(path)
        except RunError:  # its name must be free for a new one
            aside = os.path.join(save_dir, f"damaged_{name}_{os.getpid()}")
            os.rename(path, aside)
            notice(f"{path} is damaged; it was renamed to {aside}.")
            continue
        if later:
            raise UsageError(
                f"--resume={resumed}: {save_dir} holds {name}, which is later and would be "
                "overwritten; give another --model_save_dir, or resume from the later one"
            )


def position(snapshot: Snapshot) -> tuple[int, int]:
    """How far a run has got, for comparisons: updates, then finished epochs."""
    return snapshot.step, -1 if snapshot.epoch is None else snapshot.epoch


def make_timed_dir() -> str:
    """A new directory under SNAPSHOT_ROOT, named after the time."""
    first = f"./{SNAPSHOT_ROOT}/model_save-{datetime.now().strftime('%Y%m%d%H%M%S')}"
    path, number = first, 1
    while True:
        try:
            os.makedirs(path)
            return path
        except FileExistsError:  # of another run that started within this second
            number += 1
            path = f"{first}-{number}"


def link_snapshot(path: str, name: str) -> None:
    """Make `snapshot_<name>`, beside the snapshot `path`, a copy of it that shares its files.

    Raises as `save_snapshot`.
    """
    target = os.path.join(os.path.dirname(path), PREFIX + name)
    with atomic_directory(target, replace=True) as temporary:
        for file in os.listdir(path):
            source, link = os.path.join(path, file), os.path.join(temporary, file)
            try:
                os.link(source, link)
            except OSError:  # a file system without hard links
                write_durably(link, Path(source).read_bytes())


def prune_snapshots(save_dir: str, keep: int) -> None:
    """Remove the oldest `snapshot_epoch_<n>`, all but the newest `keep`, and nothing else."""
    numbers = sorted(
        int(match[1]) for match in map(EPOCH_NAME.fullmatch, os.listdir(save_dir)) if match
    )
    for number in numbers[:-keep]:
        path = os.path.join(save_dir, f"{PREFIX}epoch_{number}")
        try:
            remove_directory(path)
        except OSError as error:
            raise RunError(f"--keep_snapshots: cannot remove {path}: {error.strerror}") from None


def find_snapshot(model_load_dir: str | None, *, models: Models, model: str | None = None) -> str:
    """The weights to read: those named, else the first of these that exists and is of `model`:

    the published folder in the working directory, the best of the newest run under SNAPSHOT_ROOT,
    and, where `model` is given, the weights that were installed with it. Where the directory of a
    run is named, its best is meant.

    Raises UsageError where there is none, with the ways to get one.
    """
    if model_load_dir is not None:
        path = existing_path(model_load_dir)
        if os.path.isdir(path):
            return find_in_run(path) or path
        try:
            check_ordinary(path)
        except FileNotFoundError:
            raise UsageError(
                f"--model_load_dir: there is no file or directory {path}; {path_hint(path)}"
            ) from None
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None
        return path
    if model in (None, "resnet50") and os.path.isdir(PUBLISHED_FOLDER):
        return PUBLISHED_FOLDER
    newest = find_newest(model)
    if newest is not None:
        return newest
    installed = None if model is None else models[model].installed_weights()
    if installed is not None:
        return installed
    what, flag = ("", "") if model is None else (f" of {model}", f" --model={model}")
    with_weights = [name for name, entry in models.items() if entry.weights is not None]
    raise UsageError(
        f"no snapshot{what} under {SNAPSHOT_ROOT}, and no folder {PUBLISHED_FOLDER}: train one "
        f"first (sh train.sh{flag}), name weights with --model_load_dir, or take those that were "
        f"installed, of --model={' or '.join(with_weights)}"
    )


def find_newest(model: str | None = None) -> str | None:
    """The best snapshot of the run under SNAPSHOT_ROOT, of `model` if given, that saved last."""
    found = []
    pattern = os.path.join(SNAPSHOT_ROOT, "**", f"{PREFIX}*", DESCRIPTION)
    for description in glob.iglob(pattern, recursive=True):  # not in hidden directories
        path = os.path.dirname(description)
        if model is None or is_snapshot_of(path, model):
            # `last` shares its files with an epoch's snapshot, whose name says more.
            found.append((os.stat(description).st_mtime_ns, is_epoch(path), path))
    if not found:
        return None
    path = max(found)[-1]
    run = os.path.dirname(path)
    # Right below SNAPSHOT_ROOT are converted weights, which have nothing to do with one another.
    return path if os.path.samefile(run, SNAPSHOT_ROOT) else find_in_run(run) or path


def find_in_run(directory: str) -> str | None:
    """The best snapshot in the directory of a run, else the one that got furthest, if any."""
    if os.path.lexists(os.path.join(directory, DESCRIPTION)):  # itself a snapshot
        return None
    best = existing_path(os.path.join(directory, f"{PREFIX}best"))
    if os.path.isfile(os.path.join(best, DESCRIPTION)):
        return best
    found = []
    for path, _ in list_snapshots(directory):
        with suppress(RunError):  # damaged
            found.append((position(read_description(path)), is_epoch(path), path))
    return max(found)[-1] if found else None


def is_epoch(path: str) -> bool:
    """Whether a snapshot has the name of an epoch, and not that of its twin, `last` or `best`."""
    return EPOCH_NAME.fullmatch(os.path.basename(path)) is not None


def compare_export(path: str, *, run: str | None) -> None:
    """Notice where an exported file, of `run`, is not of the newest run, or older than its best."""
    newest = find_newest()
    if newest is None:
        return
    of = os.path.dirname(newest)
    if os.path.basename(of) != run:
        made_from = f"of the run {run}" if run else "not of a run"
        notice(f"{path} is {made_from}; the newest is {of}: resnet_to_onnx.py exports it.")
    elif os.stat(path).st_mtime_ns < os.stat(os.path.join(newest, DESCRIPTION)).st_mtime_ns:
        notice(f"{path} is older than {newest}: resnet_to_onnx.py exports it.")


def is_snapshot_of(path: str, model: str) -> bool:
    """Whether a snapshot says that it is of this network. A damaged one says nothing."""
    try:
        return read_description(path).model == model
    except RunError:
        return False


def find_resume(
    resume: str | None, save_dir: str | None, *, check: SnapshotCheck = lambda snapshot, path: None
) -> Checkpoint | None:
    """The snapshot that --resume means, read and checked; None for a fresh start.

    Args:
        resume: a snapshot, a directory whose newest intact snapshot is taken, `auto` for that of
            `save_dir`, or None.
        save_dir: --model_save_dir.
        check: raises RunError for a snapshot that this run cannot use, for instance
            cnns.resume.check_flags.

    Raises UsageError where there is no such directory, or `auto` has no --model_save_dir; RunError
    where the snapshot cannot be resumed.
    """
    if resume is None:
        return None
    if resume == "auto":
        if save_dir is None:
            raise UsageError("--resume=auto needs --model_save_dir: the directory of the run")
        snapshots = list_snapshots(save_dir)
        found = newest_intact(snapshots, check)
        if snapshots and found is None:
            raise RunError(
                f"none of the snapshots in {save_dir} is intact, see above; move them away for a "
                "fresh start"
            )
        return found
    path = existing_path(os.path.normpath(resume))
    if not os.path.isdir(path):
        raise UsageError(f"--resume: there is no directory {resume}; {path_hint(resume)}")
    if os.path.lexists(os.path.join(path, DESCRIPTION)):
        snapshot = read_description(path)
        check(snapshot, path)
        return read_resumable(path, snapshot)
    found = newest_intact(list_snapshots(path), check)
    if found is None:
        raise UsageError(f"--resume: {path} holds no snapshot to resume")
    return found


def newest_intact(snapshots: frozenset[tuple[str, int]], check: SnapshotCheck) -> Checkpoint | None:
    """The intact one of `list_snapshots` with the most progress; a notice names those skipped."""
    found = []
    for path, _ in sorted(snapshots):
        try:
            snapshot = read_description(path)
            check(snapshot, path)
        except RunError as error:
            notice(f"Skipped: {error}.")
            continue
        found.append((position(snapshot), is_epoch(path), path, snapshot))
    for *_, path, snapshot in sorted(found, key=lambda each: each[:3], reverse=True):
        try:
            return read_resumable(path, snapshot)
        except RunError as error:
            notice(f"Skipped: {error}.")
    return None


def list_snapshots(save_dir: str | None) -> frozenset[tuple[str, int]]:
    """Path and inode of each snapshot in a directory, so that new ones can be noticed."""
    if save_dir is None or not os.path.isdir(save_dir):
        return frozenset()
    with os.scandir(save_dir) as entries:
        return frozenset(
            (os.path.join(save_dir, entry.name), entry.inode())
            for entry in entries
            if entry.name.startswith(PREFIX) and entry.is_dir()
        )


def restore(
    model_load_dir: str | None,
    *,
    models: Models,
    model: str | None,
    num_classes: int | None,
    switches: Switches = Switches(),
    **preprocessing: Any,
) -> tuple[nn.Module, Snapshot, str]:
    """The network of a snapshot, on the host, with what the snapshot says and its path.

    Args:
        model_load_dir: as in `find_snapshot`; of any format.
        model, num_classes: refused where they contradict the snapshot.
        switches: how the network is to compute; a snapshot fits any.
        preprocessing: fields of Preprocessing; what is not None replaces the snapshot's.
    """
    path = find_snapshot(model_load_dir, models=models, model=model)
    checkpoint = open_checkpoint(path, models=models, model=model)
    snapshot = checkpoint.snapshot
    check_fits(checkpoint, models=models, model=model, num_classes=num_classes)
    entry = models[snapshot.model]
    snapshot.preprocessing = entry.override(snapshot.preprocessing, **preprocessing)
    check_switches(models, snapshot.model, switches)
    network = entry.build(snapshot.num_classes, switches)
    for text in [*checkpoint.notices(), *checkpoint.load(network)]:
        notice(text)
    return network, snapshot, path
