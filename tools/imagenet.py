"""ImageNet's own files, the archives as downloaded or folders, as an index of images.

An archive is not unpacked: its headers are walked once, jumping over the images, and what is kept
of each image is its name, offset, size and label. Every fault in the names is found here, before
anything is written.
"""

import functools
import itertools
import os
import re
import sys
import tarfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnns.convert.folder import is_image_name, some
from cnns.convert.jpegs import passed_through
from cnns.convert.writer import Example, file_stamp, read_image
from cnns.data.images import (
    CLASSES_FILE,
    MAX_PIXELS,
    BadImage,
    read_classes,
    read_lines,
)
from cnns.errors import RunError, UsageError
from cnns.hints import path_hint
from cnns.inputs import Tree, check_ordinary, open_input

VAL_LABELS = CLASSES_FILE.with_name("imagenet_val_labels.txt")
NUM_TRAIN = 1_281_167  # images of the official training archive
# What --input may hold, in the order of preference; two of one kind are refused.
PLACES = {
    "train": ("ILSVRC2012_img_train.tar", "train"),
    "validation": ("ILSVRC2012_img_val.tar", "validation", "val"),
}
WORDNET_ID = re.compile(r"n\d{8}")
OFFICIAL_NAME = re.compile(r"(n\d{8})_.*")  # n01440764_10026.JPEG
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
HEADER_BYTES = 1 << 16  # more than any header needs
INDEX_SECONDS = 10.0  # between lines of progress


# The index.


class Index:
    """Images as they are found: path below the source, class folder, and place in an archive."""

    def __init__(self, source: Path):
        self.source = source
        self.stamp = ""  # of an archive: its size and time
        self.names: list[str] = []
        self.folder_of: list[str] = []  # class folder of each image; empty: in none
        self.offsets, self.sizes = array("q"), array("q")
        self.folders: dict[str, None] = {}
        self.others: list[str] = []  # files that are not images by name

    def add(self, path: str, folder: str, offset: int = -1, size: int = -1) -> None:
        self.names.append(path)
        self.folder_of.append(folder)
        self.offsets.append(offset)
        self.sizes.append(size)
        if folder:
            self.folders[folder] = None

    def sort(self) -> None:
        """By path, so that archive and folder give the same. Raises RunError for a duplicate."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        self.names = [self.names[i] for i in order]
        self.folder_of = [self.folder_of[i] for i in order]
        self.offsets = array("q", (self.offsets[i] for i in order))
        self.sizes = array("q", (self.sizes[i] for i in order))
        for i, (name, following) in enumerate(itertools.pairwise(self.names)):
            if name == following:
                raise RunError(
                    f"{self.source}: two files are named {name}: their data begin at bytes "
                    f"{self.offsets[i]} and {self.offsets[i + 1]}"
                )


class Window:
    """Bytes `begin` to `end` of a file, as tarfile reads them.

    A malicious header could make tarfile read all of it, so what is read for a member is limited.
    """

    def __init__(self, handle: int, begin: int, end: int):
        self.handle, self.begin, self.size = handle, begin, end - begin
        self.at, self.left = 0, HEADER_BYTES

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> None:
        self.at = at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError("it is too long")
        self.left -= size
        size = max(0, min(size, self.size - self.at))
        data = os.pread(self.handle, size, self.begin + self.at)
        self.at += len(data)
        return data


def walk_tar(window: Window, where: str) -> Iterator[tuple[str, int, int]]:
    """(path, offset in the file, size) of each file in a tar archive.

    Reads the headers only. Raises RunError for an archive that is cut off or damaged, or holds
    anything but files and directories.
    """
    at, end, broken = 0, window.begin + window.size, False
    try:
        with tarfile.open(fileobj=window, mode="r:", encoding="utf-8") as archive:  # type: ignore[call-overload]  # only reads
            for member in archive:
                archive.members.clear()  # tarfile keeps them all
                window.left = HEADER_BYTES
                # tarfile takes 0 for a size of a pax header that is not a number.
                number = member.pax_headers.get("size", "0").isdecimal()
                if not number or member.size < 0 or archive.offset <= at:
                    raise tarfile.ReadError("a size below 0, or none")
                at = archive.offset
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    raise RunError(
                        f"{where}: {member.name} is a link or a special file; pack the images "
                        "themselves"
                    )
                offset = window.begin + member.offset_data
                if offset + member.size > end:
                    raise RunError(
                        f"{where}: {member.name} extends to byte {offset + member.size}, but "
                        f"the archive ends at byte {end}: it is cut off; copy or download it again"
                    )
                yield member.name, offset, member.size
    except OSError as error:
        raise RunError(f"{where}: cannot be read: {error.strerror}") from None
    except (tarfile.TarError, ArithmeticError, LookupError, ValueError, RecursionError):
        broken = True
    # tarfile takes anything but a header for the end of the archive.
    window.left = HEADER_BYTES
    window.seek(at)
    block = window.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise RunError(
            f"{where}: ends at byte {end} without tar's end mark: it is cut off; copy or download "
            "it again"
        )
    if at == 0 and block[257:262] != b"ustar" and any(block):
        gzip = ": it is compressed; gunzip it first" if block[:2] == b"\x1f\x8b" else ""
        raise RunError(f"{where}: is not a tar archive{gzip}")
    if broken or any(block):
        raise RunError(
            f"{where}: the tar header at byte {window.begin + at} cannot be read: the archive is "
            "damaged; copy or download it again"
        )


def index_archive(path: Path) -> Index:
    """The images of an archive: of classes, one tar each; in folders; or flat."""
    index = Index(path)
    try:
        with open_input(path, buffering=0) as file:
            state, printed = os.fstat(file.fileno()), time.monotonic()
            index.stamp = f"{state.st_size} {state.st_mtime_ns}"
            whole = Window(file.fileno(), 0, state.st_size)
            for name, offset, size in walk_tar(whole, str(path)):
                if time.monotonic() - printed > INDEX_SECONDS:
                    printed = time.monotonic()
                    share = offset * 100 // state.st_size
                    print(f"{path}: reading the headers, {share} % done", file=sys.stderr)
                if not name.endswith(".tar"):
                    add_member(index, name, "", offset, size)
                    continue
                folder = os.path.basename(name).removesuffix(".tar")
                if folder in index.folders:
                    raise RunError(f"{path}: holds two archives named {folder}.tar")
                index.folders[folder] = None
                inner = Window(file.fileno(), offset, offset + size)
                for member, *place in walk_tar(inner, f"{path}: {name}"):
                    add_member(index, member, folder, *place)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return index


def add_member(index: Index, path: str, folder: str, offset: int, size: int) -> None:
    pieces = [piece for piece in path.split("/") if piece not in ("", ".")]
    if not folder and len(pieces) > 1 and WORDNET_ID.fullmatch(pieces[-2]):
        folder = pieces[-2]
    if pieces and is_image_name(pieces[-1]):
        index.add(os.path.join(folder, pieces[-1]), sys.intern(folder), offset, size)
    else:
        index.others.append(path)


def index_folder(root: Path, tree: Tree) -> Index:
    """The images of a folder: in class folders, or flat."""
    index, source = Index(root), str(root)

    def scan(folder: str) -> list[str]:
        below = []
        try:
            for name, is_folder in tree.entries(str(root / folder)):
                path = os.path.join(folder, name)
                if is_folder:
                    below.append(path)
                elif is_image_name(name):
                    index.add(path, folder)
                    tree.add(source, path)
                else:
                    index.others.append(path)
        except OSError as error:
            raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from None
        return below

    for folder in scan(""):
        index.folders[folder] = None
        if deeper := scan(folder):
            raise RunError(
                f"{root / deeper[0]}: is a folder in a class folder, which may hold images only"
            )
    return index


# Labels, and faults in names.


def read_val_labels(path: Path, wordnet_ids: list[str]) -> np.ndarray:
    """The label of each validation image, in the order of their numbers, which begin with 1.

    A line holds a label, counted from 0, or a WordNet id. Raises UsageError.
    """
    lines = " ".join(read_lines(path, "labels")).split()
    label_of = {name: label for label, name in enumerate(wordnet_ids)}
    label_of |= {str(label): label for label in range(len(wordnet_ids))}
    for number, line in enumerate(lines, start=1):
        if line not in label_of:
            hint = ""
            if line == str(len(wordnet_ids)):
                hint = "; ILSVRC's own ids count from 1 and in another order"
            raise UsageError(
                f"{path}: line {number} is {line!r}, which is neither a label of 0 to "
                f"{len(wordnet_ids) - 1} nor the WordNet id of a class{hint}"
            )
    if not lines:
        raise UsageError(f"{path}: is empty; needs one label a line")
    return np.array([label_of[line] for line in lines], np.int32)


def refuse_folders(index: Index, label_of: dict[str, int], names: list[str]) -> None:
    """Raise RunError unless the class folders are the classes of the list, each with an image."""
    unknown = sorted(set(index.folders) - set(label_of))
    if unknown:
        raise RunError(
            f"{index.source}: folders that are not among the {len(label_of)} classes "
            f"({len(unknown)}): {some(unknown)}"
        )
    missing = sorted(set(label_of) - set(index.folders))
    if missing:
        described = some(f"{wnid} ({names[label_of[wnid]]})" for wnid in missing)
        raise RunError(
            f"{index.source}: {len(missing)} of {len(label_of)} classes missing: {described}; "
            "without them, labels would have no images"
        )
    empty = sorted(set(index.folders) - set(index.folder_of))
    if empty:
        raise RunError(f"{index.source}: the class {some(empty)} holds no image")


def train_labels(index: Index, label_of: dict[str, int], names: list[str]) -> np.ndarray:
    if "" in index.folder_of:
        loose = index.names[index.folder_of.index("")]
        raise RunError(f"{index.source}: {loose} is outside the class folders, so it has no class")
    refuse_folders(index, label_of, names)
    for path, folder in zip(index.names, index.folder_of, strict=True):
        match = OFFICIAL_NAME.fullmatch(os.path.basename(path))
        if match and match[1] in label_of and match[1] != folder:
            raise RunError(f"{index.source}: {path} belongs to another class by its name")
    return np.array([label_of[folder] for folder in index.folder_of], np.int32)


def validation_labels(
    index: Index, label_of: dict[str, int], names: list[str], table: np.ndarray, table_name: str
) -> np.ndarray:
    if index.folders:
        refuse_folders(index, label_of, names)
    labels, seen, official = [], dict[str, str](), 0
    for path, folder in zip(index.names, index.folder_of, strict=True):
        name = os.path.basename(path)
        if name in seen:
            raise RunError(f"{index.source}: two files are named {name}: {seen[name]}, {path}")
        seen[name] = path
        match = VAL_NAME.fullmatch(name)
        number = int(match[1]) if match else 0
        known = 1 <= number <= len(table)
        official += known
        if not known and not folder:
            raise RunError(
                f"{index.source}: {path} has no label: {table_name} covers "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(table):08d}.JPEG"
            )
        listed = int(table[number - 1]) if known else label_of[folder]
        if folder and label_of[folder] != listed:
            raise RunError(
                f"{index.source}: {path} is of class {listed} by {table_name}, but its folder is "
                f"class {label_of[folder]}"
            )
        labels.append(listed)
    if official == len(labels) and official < len(table):
        missing = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, len(table) + 1)]
        missing = [name for name in missing if name not in seen]
        raise RunError(
            f"{index.source}: {len(missing)} of {len(table)} validation images missing: "
            f"{some(missing, 3)}"
        )
    return np.array(labels, np.int32)


# Loading.


@functools.lru_cache(maxsize=4)
def open_archive(path: Path) -> int:
    check_ordinary(path)
    return os.open(path, os.O_RDONLY)  # until the process ends


@dataclass(frozen=True)
class Images:
    """Loads the i-th image of an index."""

    index: Index
    labels: np.ndarray  # (N,) int32
    classes: list[str]
    wordnet_ids: list[str]
    resize_shorter: int | None
    decode: bool
    max_pixels: int

    def read(self, i: int) -> bytes:
        index = self.index
        if not index.stamp:
            return read_image(os.path.join(index.source, index.names[i]))
        try:
            data = os.pread(open_archive(index.source), index.sizes[i], index.offsets[i])
        except OSError as error:
            raise BadImage(error.strerror) from None
        if len(data) != index.sizes[i]:
            raise BadImage("the archive has become shorter")
        return data

    def __call__(self, i: int) -> Example:
        data, was, info = passed_through(
            self.read(i),
            shorter=self.resize_shorter,
            decode=self.decode,
            max_pixels=self.max_pixels,
        )
        label = int(self.labels[i])
        more = {
            "filename": os.fsencode(os.path.basename(self.index.names[i])),
            "class/synset": self.wordnet_ids[label],
            "class/text": self.classes[label],
            "height": info.height,
            "width": info.width,
            "format": "JPEG",
            "colorspace": "RGB",
            "channels": 3,
            "data_id": str(i),
        }
        return Example(data, label, change=was, more=more)

    def fingerprint(self, i: int, *, with_time: bool = True) -> bytes:
        index, label = self.index, self.labels[i]
        if index.stamp:
            stamp = index.stamp if with_time else ""
            return f"{label} {index.offsets[i]} {index.sizes[i]} {stamp}".encode()
        path = os.path.join(index.source, index.names[i])
        return file_stamp(path, label, with_time=with_time)


# The sources.


def find_source(root: Path, split: str) -> Path:
    """The archive or the folder of a split below --input. Raises UsageError."""
    if not root.is_dir():
        raise UsageError(f"--input={root}: is not a folder")
    found = [name for name in PLACES[split] if (root / name).exists()]
    if not found:
        raise UsageError(
            f"--input={root}: holds neither {PLACES[split][0]} nor {PLACES[split][1]}/; give "
            f"--{split}=FILE_OR_FOLDER, or both --train and --validation without --input"
        )
    if len(found) > 1:
        raise UsageError(
            f"--input={root}: holds {' and '.join(found)}; choose by --{split}={root / found[0]}"
        )
    return root / found[0]


def find_sources(root: Path | None, **given: Path | None) -> dict[str, Path]:
    """Archive or folder by the name of the split; without `root`, of those that are given."""
    sources = {}
    for split, path in given.items():
        if path is not None and not path.exists():
            raise UsageError(
                f"--{split}={path}: there is no such file or folder; {path_hint(path)}"
            )
        if source := path or (root and find_source(root, split)):
            sources[split] = source
    if not sources:
        raise UsageError("give --input, or --train, --validation or both")
    return sources


def load_images(
    sources: dict[str, Path],
    *,
    classes_path: Path = CLASSES_FILE,
    val_labels_path: Path = VAL_LABELS,
    resize_shorter: int | None = None,
    decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    follow_links: bool = False,
) -> tuple[dict[str, Images], list[str], list[str]]:
    """Loaders by split, class names, and notices. Raises UsageError and RunError."""
    names, wordnet_ids = read_classes(classes_path)
    if not wordnet_ids:
        raise UsageError(
            f"--classes={classes_path}: has no WordNet ids, by which folders are named"
        )
    label_of = {wnid: label for label, wnid in enumerate(wordnet_ids)}
    loaders, notices = {}, []
    for split, source in sources.items():
        if source.is_dir():
            tree = Tree(source, follow_links=follow_links)
            index = index_folder(source, tree)
            tree.check_once()
        else:
            index = index_archive(source)
        index.sort()
        if split == "train":
            labels = train_labels(index, label_of, names)
            if classes_path == CLASSES_FILE and len(labels) != NUM_TRAIN:
                notices.append(
                    f"{source}: {len(labels)} images; the official archive holds {NUM_TRAIN}"
                )
        else:
            table = read_val_labels(val_labels_path, wordnet_ids)
            labels = validation_labels(index, label_of, names, table, val_labels_path.name)
        if not len(labels):
            raise RunError(f"{source}: holds no images")
        if index.others:
            notices.append(
                f"{source}: left out, not named like images ({len(index.others)}): "
                f"{some(index.others)}"
            )
        loaders[split] = Images(
            index, labels, names, wordnet_ids, resize_shorter, decode, max_pixels
        )
    return loaders, names, notices
