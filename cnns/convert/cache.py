"""A folder of pictures as a data set: converted once, and again only after it has changed.

What was made of it is `<cache>/<name>-<stamp>`, with `train/` or `validation/` in it or both. The
stamp is of the names, sizes and times of the files, their labels, and the settings; where the
folder lies is not in it. The directory is filled under the name `<name>-<stamp>.making`, locked, as
cnns.convert.writer does it, and gets its own name when all of it is on disk and the folder has
still the stamp it had.

OneFlow does not survive a fork, so a process that has loaded it has another one convert: this file
as a script, which reads a request from stdin and writes its reply to stdout.
"""

import ctypes
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cnns.checkpoint.files import sync_directory
from cnns.convert import folder
from cnns.convert.pool import PR_SET_PDEATHSIG
from cnns.convert.writer import write_dataset
from cnns.data.format import part_names, read_manifest
from cnns.errors import RunError, UsageError, describe, printable
from cnns.inputs import Tree, is_within
from cnns.log import notice

VERSION = 1  # of what is made of the same files; another one is another stamp
VAL_SPLIT = 0.1
SPLIT_SEED = 0  # not --seed: runs of several seeds are validated on the same images
MAKING = ".making"
WHOLE = (*folder.VALIDATION_FOLDERS, "test")  # names of folders that nobody trains on


@dataclass(frozen=True)
class Settings:
    """How folders of pictures are taken."""

    val_split: float | None
    cache_dir: str
    skip_bad: bool
    follow_links: bool


@dataclass(frozen=True)
class Request:
    """What is to be converted."""

    roots: dict[str, str]  # of classes, by `train` and `validation`; "" for what is to be split
    share: float  # of "", for validation
    classes: list[str] | None  # names in the order of the labels; None: the folders'
    settings: Settings

    def look(self) -> "Found":
        """Walk the folders. Raises as `folder.find_sides`."""
        roots = {name: Path(root) for name, root in self.roots.items()}
        for root in roots.values():
            if is_within(self.settings.cache_dir, str(root)):
                raise UsageError(
                    f"--cache_dir={self.settings.cache_dir} lies in {root} and would become one of "
                    "its classes; give another directory"
                )
        notes: list[str] = []
        links = self.settings.follow_links
        trees = {name: Tree(root, follow_links=links) for name, root in roots.items()}
        sides, classes = folder.find_sides(
            roots, trees, classes=self.classes, source="the network", notes=notes
        )
        for tree in trees.values():
            tree.check_once()
        return Found(self, sides, classes, notes)


@dataclass(frozen=True)
class Found:
    """The pictures of a request."""

    request: Request
    sides: dict[str, folder.Side]
    classes: list[str]
    notes: list[str]

    @property
    def settings(self) -> dict:
        """What the parts depend on, beside the files."""
        split = {"val_split": self.request.share, "seed": SPLIT_SEED} if "" in self.sides else {}
        return {"version": VERSION} | split

    def stamp(self) -> str:
        digest = hashlib.sha256(json.dumps([self.settings, self.classes]).encode())
        for name, side in self.sides.items():
            for path, label in zip(side.paths, side.labels, strict=True):
                with suppress(OSError):  # what is gone meanwhile is seen by the writer
                    state = os.stat(side.root / path)
                    entry = [name, label, state.st_size, state.st_mtime_ns]
                    digest.update(json.dumps(entry).encode() + os.fsencode(path) + b"\0")
        return digest.hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of the folder, as the beginning of a directory's name."""
        root = next(iter(self.sides.values())).root.resolve()
        root = root.parent if root.name in ("train", *WHOLE) else root
        return re.sub(r"[^\w.+-]", "_", printable(root.name)) or "folder"

    def entry(self) -> Path:
        return Path(self.request.settings.cache_dir, f"{self.name}-{self.stamp()}")


# Which folders a command means.


def is_photo_folder(path: str | None) -> bool:
    """Whether a path is of a directory with folders in it and no parts."""
    if path is None or not os.path.isdir(path):
        return False
    try:
        if part_names(path):
            return False
        names = folder.subfolders(Path(path))
        for name in names:
            if name in ("train", *folder.VALIDATION_FOLDERS) and part_names(f"{path}/{name}"):
                return False  # directories of parts, one of which should have been given
    except (OSError, UsageError):
        return False
    return bool(names)


def one_root(path: str, side: str, *, flag: str) -> str:
    """The folder of classes in `path` that is for one side."""
    roots = folder.find_roots(Path(path), flag=flag, val_split=None, notes=[])
    return str(roots.get(side, roots.get("")))


def convert_for_training(
    train: str, validation: str | None, *, settings: Settings
) -> tuple[str, str | None, list[str]]:
    """The directories of parts to train and to validate on, and notices for the user.

    What is not a folder of pictures is returned as it is.
    """
    share = settings.val_split
    if not is_photo_folder(train):
        if not is_photo_folder(validation):
            return train, validation, []
        root = one_root(str(validation), "validation", flag="--val_data_dir")
        manifest = read_manifest(train) if os.path.isdir(train) else None
        classes = (manifest or {}).get("classes")
        made, notices = convert(Request({"validation": root}, 0, classes, settings))
        return train, made["validation"], notices
    if validation is not None and not os.path.exists(validation):
        return train, validation, []  # it will be named
    if validation is None or os.path.samefile(train, validation):
        return convert_one(train, settings=settings)
    if share is not None:
        raise UsageError(
            f"--val_split={share:g} has no effect beside --val_data_dir={validation}; leave one out"
        )
    roots = {"train": one_root(train, "train", flag="--train_data_dir")}
    if is_photo_folder(validation):
        roots["validation"] = one_root(validation, "validation", flag="--val_data_dir")
    made, notices = convert(Request(roots, 0, None, settings))
    return made["train"], made.get("validation", validation), notices


def convert_one(path: str, *, settings: Settings) -> tuple[str, str | None, list[str]]:
    """The same where one folder is for both."""
    share, about = settings.val_split, list[str]()
    found = folder.find_roots(
        Path(path), flag="--train_data_dir", val_split=share, may_split=True, notes=about
    )
    roots = {name: str(root) for name, root in found.items()}
    if "" in roots:
        if share == 1:
            raise UsageError("--val_split=1 leaves nothing to train on; give less")
        if share is None:
            share = VAL_SPLIT
            about.append(
                f"{roots['']} is not split: {share:.0%} of each class are kept for validation "
                f"(--val_split={share:g})."
            )
        if share == 0:
            roots = {"train": roots[""]}
    made, notices = convert(Request(roots, share or 0, None, settings))
    return made["train"], made.get("validation"), about + notices


def convert_for_evaluation(
    path: str, *, settings: Settings, classes: list[str] | None, trained_on: dict
) -> tuple[str, list[str]]:
    """The directory of parts to score, and notices for the user.

    Args:
        classes: of the network: they give the labels.
        trained_on: flags of the run, if known: of a folder that it has split, what it kept for
            validation is scored.

    Raises UsageError where it is not clear which images of a folder are meant.
    """
    if not is_photo_folder(path):
        return path, []
    share, flag = settings.val_split, "--val_data_dir"
    val = trained_on.get("val_data_dir")
    split_by_run = is_same(path, trained_on.get("train_data_dir")) and val in (None, path)
    if share is None and split_by_run:
        recorded = trained_on.get("val_split")
        share = recorded if isinstance(recorded, float) else VAL_SPLIT
    found = folder.find_roots(Path(path), flag=flag, val_split=None, may_split=True, notes=[])
    if "validation" in found:
        if settings.val_split is not None:
            raise UsageError(
                f"--val_split={settings.val_split:g}: {path} holds {found['validation'].name}/, "
                "which is scored; leave it out"
            )
        share = 1
    elif share is None:
        if Path(path).resolve().name not in WHOLE:
            raise UsageError(
                f"{flag}={path} is not split into training and validation: --val_split="
                f"{VAL_SPLIT:g} scores the images that training keeps for validation, "
                "--val_split=1 all of them"
            )
        share = 1
    if share == 0:
        raise UsageError(f"--val_split=0 leaves nothing of {path} to score; --val_split=1: all")
    root = str(found.get("validation", found.get("")))
    roots = {"validation": root} if share == 1 else {"": root}
    made, notices = convert(Request(roots, share, classes, settings))
    return made["validation"], notices


def is_same(path: str, other: object) -> bool:
    return isinstance(other, str) and os.path.exists(other) and os.path.samefile(path, other)


# Converting them.


def convert(request: Request) -> tuple[dict[str, str], list[str]]:
    """Directories of parts by their side, and notices. Raises RunError or UsageError."""
    found = request.look()
    entry, notices = found.entry(), []
    if entry.is_dir():
        notices.append(f"{' and '.join(request.roots.values())}: unchanged, read from {entry}.")
    else:
        entry = have_converted(request)
    sides = ("train", "validation") if "" in request.roots else tuple(request.roots)
    return {side: str(entry / side) for side in sides}, notices


def have_converted(request: Request) -> Path:
    """Run `make_entry` in another process. Raises what it raised."""
    command = [sys.executable, os.path.abspath(__file__)]
    text = json.dumps(asdict(request))
    run = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=False)
    try:
        reply = json.loads(run.stdout)
    except ValueError:
        raise RunError(
            f"the conversion of {' and '.join(request.roots.values())} ended with status "
            f"{run.returncode}; start again to resume it"
        ) from None
    if "error" in reply:
        status, text = reply["error"]
        raise (UsageError if status == UsageError.exit_status else RunError)(text)
    return Path(reply["entry"])


def lock_entry(making: Path) -> int:
    """Lock a directory that is made if need be. Waits for another process. Raises OSError."""
    making.mkdir(parents=True, exist_ok=True)
    handle = os.open(making, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        notice(f"Waiting for another process that makes {making} ...")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
    return handle


def make_entry(request: Request) -> Path:
    """Convert, unless another process has done it meanwhile. Raises RunError or UsageError."""
    found = request.look()
    entry = found.entry()
    making = entry.with_name(entry.name + MAKING)
    try:
        handle = lock_entry(making)
    except OSError as error:
        raise RunError(f"--cache_dir: cannot write to {error.filename}: {error.strerror}") from None
    try:
        if entry.is_dir():
            with suppress(OSError):  # empty, if this process made it
                making.rmdir()
            return entry
        fill(making, found)
        if request.look().entry() != entry:
            shutil.rmtree(making, ignore_errors=True)
            raise RunError(
                f"{' and '.join(request.roots.values())} changed while it was converted; start "
                "again when it is complete"
            )
        os.rename(making, entry)
        sync_directory(entry.parent)
    except OSError as error:
        raise RunError(f"{error.filename or making}: cannot write: {error.strerror}") from None
    finally:
        os.close(handle)
    others = [path for path in entry.parent.glob(f"{found.name}-*") if path != entry]
    if others:
        listed = folder.some(sorted(map(str, others)))
        notice(f"Made of earlier states or other settings, to be removed if unneeded: {listed}.")
    return entry


def fill(making: Path, found: Found) -> None:
    """Write both sides into `making`, where an earlier run may have begun to."""
    where = " and ".join(found.request.roots.values())
    count = sum(len(side.paths) for side in found.sides.values())
    notice(f"Converting {count} images of {where} into {making.name.removesuffix(MAKING)} ...")
    sources = {name: (s, folder.file_digests(s.absolute)) for name, s in found.sides.items()}
    if "" in sources:
        side, digests = sources[""]
        train, validation, about = folder.split_side(
            side, digests, share=found.request.share, seed=SPLIT_SEED
        )
        sides = {"train": train, "validation": validation}
    else:
        sides, about = found.sides, folder.describe(found.sides, sources)
    for text in found.notes + about:
        notice(text)
    left = {name: side for name, side in sides.items() if not (making / name).is_dir()}
    if not left:
        return
    content = folder.content_digest(sources)
    with redirect_stdout(io.StringIO()):
        write_dataset(
            [side.split(making / name) for name, side in sides.items()],
            classes=found.classes,
            choose_num_parts=choose_num_parts,
            skip_bad=found.request.settings.skip_bad,
            num_workers=None,
            made_by={"tool": "a folder of pictures", "arguments": found.settings}
            | {"source": content},
        )


def choose_num_parts(num_examples: int) -> int:
    """A multiple of 8, so that 2, 4 and 8 processes get equal shares, of up to 10,000 images."""
    return max(1, min(8 * -(-num_examples // 80_000), num_examples // 4))


def main() -> int:
    """As a script: convert what stdin asks for."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up first
    asked = json.load(sys.stdin)
    request = Request(**asked | {"settings": Settings(**asked["settings"])})
    try:
        reply: dict = {"entry": str(make_entry(request))}
    except (UsageError, RunError, OSError, MemoryError) as error:
        reply = {"error": describe(error)}
    except KeyboardInterrupt:
        return 130
    print(json.dumps(reply))
    return 0


if __name__ == "__main__":
    sys.exit(main())
